"""A checkpoint of a rank at full size, with its checksums, against a bare torch.save of the same state, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/checkpoint.py

The state is two ResNet-50 with their momentum and the 22 bytes that DivideMix keeps of each of 2.4 M samples. The
reference is ours: torch.save of all into one file, flushed to the disk, and torch.load of it; nothing is checked, and
another number of ranks could not read it. To load the checkpoint is to look through it for damage and to read it.
Leaves benchmarks/results/checkpoint-DATE.json.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch

from nldist.dist.checkpoint import Checkpoints, Position
from nldist.dist.table import SampleTable
from nldist.dist.world import World
from nldist.errors import main_guard
from nldist.models import build_model

COLUMNS = {"loss": (torch.float32, (2,)), "clean": (torch.float32, (2,)), "guess": (torch.int16, (2,))}
COLUMNS |= {"flags": (torch.int8, (2,))}


@main_guard
def main() -> None:
    """Measure in turns, print and record medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=2_400_000)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    world = World.single()
    networks = [build_model(options.model, 1000).state_dict() for _ in range(2)]
    shared = {"networks": networks, "momentum": [{name: rows + 0 for name, rows in net.items()} for net in networks]}
    table = SampleTable(options.num_samples, world)
    for name, (dtype, shape) in COLUMNS.items():
        table.add(name, dtype, shape)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, bare = Checkpoints(Path(folder) / "checkpoints", world, 1, "a data set"), Path(folder) / "bare.pt"

        def load() -> None:
            path = checkpoints.latest()
            assert path is not None
            checkpoints.load(path, table)

        turns = [
            {
                "save": seconds(partial(checkpoints.save, Position(turn), shared, {}, table)),
                "save, bare": seconds(lambda: save_bare(bare, shared, table)),
                "load": seconds(load),
                "load, bare": seconds(lambda: torch.load(bare)),
            }
            for turn in range(options.turns)
        ]
        num_bytes = bare.stat().st_size
    medians = {what: median(turn[what] for turn in turns) for what in turns[0]}
    ratios = {what: medians[f"{what}, bare"] / medians[what] for what in ("save", "load")}
    print({what: round(value, 2) for what, value in medians.items()}, {k: round(v, 2) for k, v in ratios.items()})
    results = {"bytes": num_bytes, "seconds": medians, "ratios": ratios, "turns": turns}
    print(f"recorded in {record.write('checkpoint', ['torch', 'numpy'], results)}")


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def save_bare(path: Path, shared: dict[str, Any], table: SampleTable) -> None:
    """All in one file, flushed to the disk."""
    with path.open("wb") as file:
        torch.save(shared | {name: table[name].rows for name in COLUMNS}, file)
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
