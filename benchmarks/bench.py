"""One table of ratios: nldist's fast paths against references, side by side in one run, in small.

    make bench        # or: OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/bench.py [SCRIPT ...]

Runs scripts of this folder at sizes at which all take less than 15 minutes on two cores; what each measures and
against what is in its own words. A ratio is how many times as fast nldist is, so that more is better. Figures at full
size and of more turns are in README.md. Leaves benchmarks/results/bench-DATE.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import record

from nldist.errors import UserError, main_guard

HERE = Path(__file__).parent
Results = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One ratio of the table, and what keeps it from being larger."""

    what: str
    fast: str
    reference: str
    ratio: float
    limit: str


def start(results: Results) -> Iterator[Row]:
    """CPU seconds."""
    for name, row in results["cpu_seconds"].items():
        yield Row(name, "now", "nldist 0.1", 1 / row["ratio"], "torch's own import")


def small_images(results: Results) -> Iterator[Row]:
    """Images a CPU second."""
    ratios = results["ratios"]
    kept, bare = ratios["kept / 0.1"], ratios["now / bare"]
    yield Row("input, 32 px", "decoded images kept", "nldist 0.1", kept, "Python per batch, copies of memory")
    yield Row("input, 32 px", "stream, decoding", "torchvision's decoder, bare", bare, "libjpeg")


def images(results: Results) -> Iterator[Row]:
    """Images a CPU second."""
    for pair, limit in (
        ("stream / bare", "libjpeg"),
        ("stream, cropped / ImageFolder", "libjpeg; cropping and scaling"),
    ):
        fast, reference = pair.split(" / ")
        yield Row("input, 256 px", fast, reference, results["ratios"][pair]["cpu"], limit)


def views(results: Results) -> Iterator[Row]:
    """CPU seconds."""
    for size, ratio in results["ratios"].items():
        yield Row(f"views, {size}", "a batch at once", "torchvision, by image", ratio, "memory; random numbers")


def mixture(results: Results) -> Iterator[Row]:
    """CPU seconds."""
    ratio = median(row["cpu_seconds_scikit_learn"] / row["cpu_seconds"] for row in results["rows"])
    yield Row("mixture, 0.6 M losses", "sums of blocks", "scikit-learn", ratio, "exponentials and logarithms")


def neighbours(results: Results) -> Iterator[Row]:
    """CPU seconds of the search."""
    for fast, key in (("two threads", "one_rank"), ("two ranks", "ranks")):
        ratio = results[f"cpu_seconds_of_faiss_by_{key}"]
        yield Row("exact k-NN graph", fast, "FAISS, two threads", ratio, "matrix products, of which half are left out")


def checkpoint(results: Results) -> Iterator[Row]:
    """Seconds."""
    for what in ("save", "load"):
        limit = "the disk; CRC-32 of every byte"
        yield Row(f"checkpoint, {what}", "with checksums", f"bare torch.{what}", results["ratios"][what], limit)


def two_ranks(results: Results) -> Iterator[Row]:
    """Images a second of all ranks."""
    for what, ratio in results["ratios"].items():
        wait = f"waits {results['data_wait_share'][what]:.0%} for data; what else the cores do"
        yield Row(f"two ranks, {what}", "two ranks, two cores", "one rank, one core", ratio, wait)


def dividemix_step(results: Results) -> Iterator[Row]:
    """CPU seconds."""
    limit, ours = "oneDNN's convolutions", "ours, as research code"
    for what in ("steps", "epochs"):
        for side, name in (("0.1", "nldist 0.1"), ("reference", ours)):
            yield Row(f"DivideMix, {what}", "float32", name, results[what][side]["times_now_cpu"], limit)
    steps = results["steps"]
    in_bf16 = steps["reference"]["times_now_cpu"] / steps["now bf16"]["times_now_cpu"]
    yield Row("DivideMix, steps", "bf16", f"{ours}, float32", in_bf16, "bf16 units, or none; batch norm")


def shard(results: Results) -> Iterator[Row]:
    """Images a CPU second of one process: two free cores give twice as many."""
    limits = {"256": "decoding each to check it", "500x400": "Lanczos", "1600x1200": "decoding at a fraction"}
    for kind, limit in limits.items():
        ratio = results["kinds"][kind]["ratio_to_reference"]["nldist, alone"]["cpu"]
        yield Row(f"sharding, {kind} px", "one process", "ShardWriter, nothing checked", ratio, limit)


@dataclass(frozen=True)
class Script:
    """A script, what it is given here, how its record's name begins, and the rows in it."""

    arguments: tuple[str, ...]
    record: str
    rows: Callable[[Results], Iterator[Row]]


SCRIPTS = {
    "start": Script(("--repeats=1", "--only=train to the first step"), "start", start),
    "small_images": Script(("--num-images=10000", "--turns=3"), "small-images", small_images),
    "input": Script(("--num-images=500", "--passes=4", "--repeats=3"), "input", images),
    "views": Script((), "views", views),
    "mixture": Script(("--num-samples=600000", "--num-repeats=3"), "mixture", mixture),
    "neighbours": Script(("exact", "--num-vectors=60000", "--num-repeats=3"), "neighbours-exact", neighbours),
    "dividemix_step": Script(("--turns=2", "--epochs=1", "--num-images=128"), "dividemix-step", dividemix_step),
    "checkpoint": Script(("--turns=3",), "checkpoint", checkpoint),
    "two_ranks": Script(("--model=small_cnn", "--turns=3"), "two-ranks", two_ranks),
    "shard": Script(("--scale=0.1", "--repeats=3"), "shard", shard),
}


@main_guard
def main() -> None:
    """Run the scripts, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), metavar="SCRIPT", help=", ".join(SCRIPTS))
    options = parser.parse_args()
    if unknown := [name for name in options.scripts if name not in SCRIPTS]:
        raise UserError(f"{unknown[0]} is none of {', '.join(SCRIPTS)}")
    rows: list[Row] = []
    whole: dict[str, Results] = {}
    for name in options.scripts:
        begin = time.perf_counter()
        whole[name] = results_of(name)
        rows += SCRIPTS[name].rows(whole[name])
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"\n{'':40}  {'fast path':24}  {'reference':28}  {'ratio':>6}  limit")
    for row in rows:
        print(f"{row.what:40}  {row.fast:24}  {row.reference:28}  {row.ratio:6.2f}  {row.limit}")
    results = {"rows": [asdict(row) for row in rows], "results": whole}
    packages = ["torch", "torchvision", "simplejpeg", "scikit-learn", "faiss-gpu", "webdataset"]
    print(f"recorded in {record.write('bench', packages, results)}")


def results_of(name: str) -> Results:
    """What a script records."""
    script = SCRIPTS[name]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+") as log:
        command = [sys.executable, str(HERE / f"{name}.py"), *script.arguments]
        environment = os.environ | {"RESULTS_DIR": folder}
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
        if code:
            log.seek(0)
            raise UserError(f"benchmarks/{name}.py ended with code {code}:\n{log.read()[-2000:]}")
        (file,) = Path(folder).glob(f"{script.record}-*.json")
        results: Results = json.loads(file.read_text())
    return {key: value for key, value in results.items() if key not in ("date", "machine", "versions")}


if __name__ == "__main__":
    sys.exit(main())
