"""Peak memory of a rank at N = 2.4 M, of this nldist and of nldist 0.1 (c551f53).

    python benchmarks/memory.py [--num-samples 2400000]

The data set is scikit-learn's digits, indexed again and again until there are N, half of the labels drawn at random:
images take no memory, so what is counted is what grows with N, and the program itself. A run of one rank is ended when
it has recorded some steps; its peak (VmHWM) is read until then, and does not depend on what else the machine does.
Leaves benchmarks/results/memory-DATE.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import record
from start import BEFORE, REPOSITORY, checkout, environment

from nldist.errors import main_guard

NUM_STEPS = 20  # recorded ones, after which a run is ended
RUNS = {
    "cross-entropy, first steps": ("method.name=cross_entropy",),
    "DivideMix: sweep, mixture, division, first steps": ("method.name=dividemix", "method.dividemix.warmup_epochs=0"),
}
SETTINGS = ("train.epochs=1", "track.enabled=false", "track.every_seconds=1e-9", "train.eval_batch_size=500")


@main_guard
def main() -> None:
    """Measure both, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=2_400_000)
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name, checkout(BEFORE, Path(name) / "before") as before:
        data = Path(name) / "data"
        prepare(before, data, options.num_samples)
        for what, settings in RUNS.items():
            trees = {"before": before, "now": REPOSITORY}
            rows[what] = {side: peak(tree, data, Path(name) / "run", settings) for side, tree in trees.items()}
            print(f"{what:50}", *(f"{side} {mib:.0f} MiB " for side, mib in rows[what].items()), flush=True)
    results = {"num_samples": options.num_samples, "peak_mib": rows}
    print(f"recorded in {record.write('memory', ['torch', 'torchvision', 'pyarrow'], results)}")


def prepare(tree: Path, data: Path, num_samples: int) -> None:
    """The digits as the older nldist shards them, under as many ids as are wanted."""
    subprocess.run([sys.executable, "tools/shard.py", "digits", str(data)], cwd=tree, env=environment(tree), check=True)
    index, facts = data / "train" / "index.parquet", json.loads((data / "dataset.json").read_text())
    rows = pq.read_table(index)
    ids = np.arange(num_samples)
    many = rows.take(pa.array(ids % len(rows))).set_column(0, "id", pa.array(ids))
    keys = pa.array([f"{id_:07d}" for id_ in ids.tolist()])
    pq.write_table(many.set_column(1, "key", keys).cast(rows.schema), index)
    facts["splits"]["train"]["num_samples"] = num_samples
    facts["splits"]["train"]["shards"][0]["num_samples"] = num_samples
    (data / "dataset.json").write_text(json.dumps(facts))
    noise = ["tools/noise.py", str(data), "--model=symmetric", "--rate=0.5", "--name=sym50"]
    subprocess.run([sys.executable, *noise], cwd=tree, env=environment(tree), check=True)


def peak(tree: Path, data: Path, run: Path, settings: tuple[str, ...]) -> float:
    """The most memory (MiB) that a run has had when it has recorded its first steps."""
    shutil.rmtree(run, ignore_errors=True)
    places = (f"data.root={data}", f"run.dir={run}")
    command = [sys.executable, "-m", "nldist.cli", "train", "tests/digits.yaml", *places, *SETTINGS, *settings]
    process = subprocess.Popen(command, cwd=tree, env=environment(tree), stdout=subprocess.DEVNULL)
    most = 0.0
    try:
        while process.poll() is None and num_lines(run / "metrics.jsonl") < NUM_STEPS:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            most = max(most, float(status.get("VmHWM", "0 kB").split()[0]) / 1024)
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    if num_lines(run / "metrics.jsonl") < NUM_STEPS:
        raise RuntimeError(f"{' '.join(command)} in {tree} ended before its first steps")
    return most


def num_lines(path: Path) -> int:
    """How many there are."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
