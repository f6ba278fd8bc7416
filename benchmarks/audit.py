"""The audit at full size: 2.4 million labels of 1,000 classes, 2,000 images in the page.

    python benchmarks/audit.py

The data set is that of benchmarks/input.py (2,000 JPEG files of about 30 kB) whose index is made longer by rows for
images that are not there; what a run says of them is drawn at random, but that the 2,000 that can be read are the most
doubtful. One label in 200 is of a byte-identical pair. Measures `nldist audit` as a process: seconds and peak memory;
the page's size; and, where there is Chromium, how long it takes from opening the page to the first image. Leaves
benchmarks/results/audit-DATE.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import record
from input import prepare

from nldist.config.file import parse_config
from nldist.data.index import RECORD, Index
from nldist.data.samples import Samples
from nldist.errors import main_guard
from nldist.run.directory import RunDirectory
from tests.browser import CHROMIUM, browser, opened

NUM_CLASSES, NUM_IMAGES = 1000, 2000
CONFIG = """
data: {root: DATA, eval_split: train}
views: {train: [{op: center_crop, size: 224}], eval: [{op: center_crop, size: 224}]}
train: {epochs: 1, batch_size: 64}
method: {name: cross_entropy}
"""


@main_guard
def main() -> None:
    """Make the run, audit it, open the page; print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=2_400_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nldist-audit-") as folder:
        run = make_run(Path(folder), options.num_samples)
        turns = [audit(run) for _ in range(options.repeats)]
        seconds = [turn[0] for turn in turns]
        page = run / "audit" / "index.html"
        results = {
            "num_samples": options.num_samples,
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "peak_memory_gib": max(turn[1] for turn in turns),
            "page_mib": page.stat().st_size / 2**20,
            "labels_csv_mib": (run / "audit" / "labels.csv").stat().st_size / 2**20,
            "first_view_seconds": first_views(page, options.repeats) if CHROMIUM else None,
        }
    print(json.dumps(results, indent=2))
    print(f"recorded in {record.write('audit', ['pyarrow', 'numpy', 'jinja2'], results)}")


def audit(run: Path) -> tuple[float, float]:
    """Seconds and peak memory in GiB of the command.

    Between it and this process, which has held the data set, stands a small one: Linux counts what a process had before
    it became the command as the command's.
    """
    small = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    small += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    command = [sys.executable, "-m", "nldist.cli", "audit", str(run), "--images", str(NUM_IMAGES)]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", small, *command], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - began, int(done.stdout.split()[-1]) / 2**20


def make_run(folder: Path, num_samples: int) -> Path:
    """A data set with a long index, and a run's opinion of it."""
    real = prepare(folder / "images", NUM_IMAGES)
    random = np.random.default_rng(0)
    rows = np.zeros(num_samples, RECORD)
    rows["crc32"] = random.integers(0, 2**32, num_samples)
    rows["size"], rows["height"], rows["width"] = random.integers(20_000, 90_000, num_samples), 256, 341
    rows["label"] = random.integers(0, NUM_CLASSES, num_samples)
    pairs = random.permutation(num_samples)[: num_samples // 200].reshape(2, -1)
    rows["crc32"][pairs[0]], rows["size"][pairs[0]] = rows["crc32"][pairs[1]], rows["size"][pairs[1]]
    for name in set(RECORD.names or ()) - {"label"}:
        rows[name][:NUM_IMAGES] = real.records[name]
    root = real.root
    keys = [f"google/q{id_ // 500:04d}/{id_:016x}" for id_ in range(num_samples)]
    columns = {"id": np.arange(num_samples), "key": keys, **{name: rows[name] for name in RECORD.names or ()}}
    pq.write_table(pa.table(columns), root / "train" / "index.parquet", row_group_size=65_536)
    facts = json.loads((root / "dataset.json").read_text())
    facts["classes"] = [f"n{number:08d} class" for number in range(NUM_CLASSES)]
    facts["splits"]["train"]["num_samples"] = num_samples
    (root / "dataset.json").write_text(json.dumps(facts))
    run = folder / "run"
    (run / "tables").mkdir(parents=True)
    RunDirectory(run).write_config(parse_config(CONFIG.replace("DATA", str(root)), "benchmark"))
    index = Index.open(root, "train")
    suggested = np.where(random.random(num_samples) < 0.7, index.label, random.integers(0, NUM_CLASSES, num_samples))
    probability = np.clip(random.normal(0.7, 0.3, num_samples), 0.001, 1).astype(np.float32)
    probability[:NUM_IMAGES] = 0
    margin = random.normal(size=num_samples).astype(np.float32)
    margin[:NUM_IMAGES] -= 20
    Samples(index.label, probability, suggested, margin, None, 1, 1).write(run, index)
    return run


def first_views(page: Path, repeats: int) -> list[float]:
    """Seconds from opening the page in a fresh window to its first image, by the browser's clock."""
    seconds = []
    with browser() as running:
        for _ in range(repeats):
            with opened(running, page) as found:
                shown = "document.querySelector('.card img').decode().then(() => performance.now())"
                seconds.append(found.page.evaluate(shown) / 1000)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
