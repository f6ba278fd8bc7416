"""DivideMix's step and epoch of this nldist, of 0.1, of a plain reference (ours) and of the authors' script, in turns.

    OMP_NUM_THREADS=1 python benchmarks/dividemix_step.py [--released DIR] [--turns 5] [--epochs 5]

PreAct-ResNet-18, 64 + 64 images of 32 pixels (crops of scikit-learn's two photographs), one thread. Each side is a
process that lives to the end and does one step, or one epoch of a few images, when it is its turn; the first step is
not counted. Reading and views are counted. An epoch is the sweep by both networks, both mixtures, and both networks'
passes, for which half of the images is then labelled on every side.

    released     DivideMix's authors' code (MIT), a clone of github.com/LiJunnan1992/DivideMix in DIR
    reference    benchmarks/reference, ours
    0.1          nldist 0.1 (commit c551f53, in a work tree of its own)
    now          the present one
    0.1 bf16, now bf16      the same with train.autocast=bf16

CPU seconds say more than seconds on a busy machine. What the float32 step's products and convolutions come to is set
against the rate of one large matrix product, which no side can exceed. Leaves
benchmarks/results/dividemix-step-DATE.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
import torch
from PIL import Image
from small_images import make_images
from start import BEFORE, REPOSITORY, checkout

from nldist.cli import main as nldist
from nldist.errors import main_guard

SIDES = Path(__file__).with_name("step_sides.py")
Times = dict[str, list[tuple[float, float]]]


class Side:
    """A process that does a step or an epoch when it is told to."""

    def __init__(self, kind: str, tree: Path, data: Path, autocast: str = "off") -> None:
        command = [sys.executable, str(SIDES), kind, str(tree), str(data), autocast]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def time(self, what: str) -> tuple[float, float]:
        """Seconds and CPU seconds of one of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(what, file=self._process.stdin, flush=True)
        wall, cpu = map(float, self._process.stdout.readline().split())
        return wall, cpu

    def end(self) -> None:
        """Let it go."""
        self._process.communicate()


@main_guard
def main() -> None:
    """Measure in turns, print and record medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", type=Path, help="the authors' code")
    parser.add_argument("--num-images", type=int, default=240, help="of an epoch")
    parser.add_argument("--turns", type=int, default=5, help="steps of each side")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of each side in float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, checkout(BEFORE, Path(name) / "before") as before:
        data = Path(name) / "data"
        prepare(options.num_images, data)
        sides = {
            "reference": Side("reference", REPOSITORY, data),
            "0.1": Side("nldist", before, data),
            "now": Side("nldist", REPOSITORY, data),
            "0.1 bf16": Side("nldist", before, data, "bf16"),
            "now bf16": Side("nldist", REPOSITORY, data, "bf16"),
        }
        if options.released is not None:
            sides = {"released": Side("released", options.released.resolve(), data)} | sides
        try:
            measured(sides, "step", 1)  # not counted
            steps = measured(sides, "step", options.turns)
            precise = {name: side for name, side in sides.items() if "bf16" not in name}
            epochs = measured(precise, "epoch", options.epochs) if options.epochs else {}
            operations, _ = sides["now"].time("operations")
        finally:
            for side in sides.values():
                side.end()
    found = {"steps": summary(steps), "epochs": summary(epochs)}
    found |= limit(operations, found["steps"])
    facts = {"num_images": options.num_images, **found, "seconds_and_cpu_seconds": {"step": steps, "epoch": epochs}}
    print(f"recorded in {record.write('dividemix-step', ['torch', 'torchvision', 'scikit-learn'], facts)}")


def prepare(num_images: int, data: Path) -> None:
    """The images as shards, and as arrays."""
    make_images(data / "raw", num_images)
    for split in ("train", "test"):
        nldist(["shard", "folder", str(data / "raw"), str(data / "set"), "--split", split])
    paths = sorted((data / "raw").glob("*/*"))
    classes = sorted({path.parent.name for path in paths})
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    order = np.random.default_rng(0).permutation(len(paths))
    labels = np.array([classes.index(path.parent.name) for path in paths])
    np.savez(data / "raw.npz", images=images[order], labels=labels[order])


def measured(sides: dict[str, Side], what: str, turns: int) -> Times:
    """Seconds of each side's turns."""
    times: Times = {name: [] for name in sides}
    for turn in range(turns):
        for name, side in sides.items():
            times[name].append(side.time(what))
        print(what, turn, {name: f"{values[-1][1]:.2f}" for name, values in times.items()}, flush=True)
    return times


def summary(times: Times) -> dict[str, Any]:
    """Medians, and how many times as long each side takes as the present nldist, in CPU seconds and in seconds."""
    found: dict[str, Any] = {}
    for name, values in times.items():
        wall, cpu = (median(column) for column in zip(*values, strict=True))
        now = times["now"]
        ratios = [tuple(a / b for a, b in zip(one, other, strict=True)) for one, other in zip(values, now, strict=True)]
        in_wall, in_cpu = (median(column) for column in zip(*ratios, strict=True))
        found[name] = {"seconds": wall, "cpu_seconds": cpu, "times_now": in_wall, "times_now_cpu": in_cpu}
        print(f"{name:10} {wall:7.2f} s, CPU {cpu:7.2f} s: {in_wall:.2f} times now's, CPU {in_cpu:.2f}")
    return found


def limit(operations: float, steps: dict[str, Any]) -> dict[str, Any]:
    """What every step must compute, as 1e9 operations, and each side's rate as a share of a large matrix product's."""
    left, right = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(9):
        began = time.process_time()
        left @ right
        times.append(time.process_time() - began)
    rate = 2 * 2048**3 / median(times)
    shares = {name: operations / row["cpu_seconds"] / rate for name, row in steps.items() if "bf16" not in name}
    print(f"a step: {operations / 1e9:.0f} GFLOP; matrix product {rate / 1e9:.0f} GFLOP/s; shares {shares}")
    return {"gflop_of_a_step": operations / 1e9, "gflop_per_second_of_a_product": rate / 1e9, "shares_of_it": shares}


if __name__ == "__main__":
    sys.exit(main())
