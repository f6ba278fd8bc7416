"""How much faster two ranks are than one: DivideMix's sweeps and steps, a core for each rank, taking turns.

    OMP_WAIT_POLICY=passive python benchmarks/two_ranks.py [--turns 5]

Each turn is an epoch of DivideMix on one rank, one on two, and two runs beside each other of one rank and half of the
images each, which have nothing to say to each other: what two of the machine's cores can do at all. A thread for each
rank: PreAct-ResNet-18, 64 + 64 images a step and rank, 32 pixels, float32; gradients of 45 MB a step go from rank to
rank. The images are crops of scikit-learn's two photographs. Counted are images a second of all ranks, and the share of
time that a rank waits for data. Steps are the second network's: the first step of a run imports torch._dynamo, for
DistributedDataParallel, which belongs to the start (benchmarks/start.py). With two busy cores that do other work as
well, the ratio says what is left of them.
Leaves benchmarks/results/two-ranks-DATE.json.
"""

import argparse
import json
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import record
from commands import run_python, train
from small_images import make_images

from nldist.errors import main_guard

Rates = dict[str, dict[str, float]]
PASSES = {"sweep": "sweep", "step": "net1"}
COUNTED = {"rate": "images_per_second", "data_wait_share": "data_wait_share"}
SETTINGS = (
    *("method.name=dividemix", "method.dividemix.warmup_epochs=0", "train.epochs=1"),
    *("train.batch_size=64", "train.autocast=off", "dist.device=cpu", "dist.num_threads=1", "data.num_workers=0"),
    *("views.train=[{op: pad_crop, size: 32, padding: 4}]", "views.eval=[{op: center_crop, size: 32}]"),
    *("data.label_set=sym50", "track.enabled=false"),
)


@main_guard
def main() -> None:
    """Measure in turns, print and record medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1280)
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        whole, half = Path(name) / "whole", Path(name) / "half"
        prepare(whole, options.num_images)
        prepare(half, options.num_images // 2)
        turns = [measured(whole, half, options.model) for _ in range(options.turns)]
    results: dict[str, Any] = {"model": options.model, "num_images": options.num_images, "turns": turns}
    results |= {"ratios": {}, "ratios_apart": {}, "data_wait_share": {}}
    for what in PASSES:
        for side, name in (("two", "ratios"), ("apart", "ratios_apart")):
            results[name][what] = median(turn[side][what]["rate"] / turn["one"][what]["rate"] for turn in turns)
        results["data_wait_share"][what] = median(turn["two"][what]["data_wait_share"] for turn in turns)
        print(f"{what}: two ranks {results['ratios'][what]:.2f} times one, wait for data", end=" ")
        print(f"{results['data_wait_share'][what]:.1%}; two runs apart {results['ratios_apart'][what]:.2f} times")
    print(f"recorded in {record.write('two-ranks', ['torch', 'torchvision', 'simplejpeg', 'webdataset'], results)}")


def prepare(work: Path, num_images: int) -> None:
    """A data set with half of its labels drawn at random."""
    make_images(work / "images", num_images)
    for split in ("train", "test"):
        run_python("tools/shard.py", "folder", str(work / "images"), str(work / "data"), f"--split={split}", quiet=True)
    noise = ["--model=symmetric", "--rate=0.5", "--seed=0", "--name=sym50"]
    run_python("tools/noise.py", str(work / "data"), *noise, quiet=True)


def measured(whole: Path, half: Path, model: str) -> dict[str, Rates]:
    """A turn."""
    turn = {"one": epoch(whole, "run", model, 1), "two": epoch(whole, "run", model, 2)}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda run: epoch(half, run, model, 1), ("first", "second"))
    turn["apart"] = {what: {"rate": first[what]["rate"] + second[what]["rate"]} for what in PASSES}
    for side, rates in turn.items():
        print(side, rates, flush=True)
    return turn


def epoch(work: Path, run: str, model: str, ranks: int) -> Rates:
    """Of a sweep and a pass with steps the images a second of all ranks, and the share of time that waits for data."""
    run_dir = work / run
    shutil.rmtree(run_dir, ignore_errors=True)
    places = (f"data.root={work / 'data'}", f"run.dir={run_dir}", f"model.name={model}")
    train("tests/digits.yaml", *places, *SETTINGS, ranks=ranks)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    facts = next(line for line in lines if line["kind"] == "epoch")
    return {what: {key: facts[f"{name}/{value}"] for key, value in COUNTED.items()} for what, name in PASSES.items()}


if __name__ == "__main__":
    sys.exit(main())
