"""On NVIDIA GPUs: training, neighbours and collectives come to what they come to on CPUs (make test-gpu)."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nldist.cli import main
from nldist.dist.world import World
from nldist.estimate.neighbours import ShardedIndex
from tests.commands import Command
from tests.estimate.test_neighbours import brute_force, exact_vectors, near_ties
from tests.ranks import CONTEXT, free_port

pytestmark = pytest.mark.gpu

CONFIG = Path(__file__).parent.parent / "digits.yaml"
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def train(run_dir: Path, digits: Path, *settings: str) -> dict[str, Any]:
    """The summary of a run."""
    arguments = ["train", str(CONFIG), f"run.dir={run_dir}", f"data.root={digits}", "track.enabled=false", *settings]
    done = Command(main, arguments, run_dir.with_name(f"{run_dir.name}-output"), os.environ).wait(300)
    assert done.returncode == 0, done.stderr
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


@pytest.mark.parametrize("autocast", ["off", "bf16"])
@pytest.mark.parametrize("method", ["cross_entropy", "dividemix"])
def test_a_run_is_as_good_as_on_a_cpu(method: str, autocast: str, digits: Path, tmp_path: Path) -> None:
    common = (f"method.name={method}", "method.dividemix.warmup_epochs=2", "train.epochs=6", "data.num_workers=2")
    on_gpu = train(tmp_path / "gpu", digits, *common, "dist.device=cuda", f"train.autocast={autocast}")
    on_cpu = train(tmp_path / "cpu", digits, *common, "dist.device=cpu", "train.autocast=off")
    assert on_gpu["accuracy"]["best"] > on_cpu["accuracy"]["best"] - 8


def collect(rank: int, world_size: int, port: int, device: str, function: Any, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with World.start(num_threads=1, device=device) as world:
        results.put((rank, function(world)))


def on_ranks(function: Any, world_size: int, device: str) -> list[Any]:
    """What `function(world)` returns on new ranks, in rank order."""
    results, port = CONTEXT.Queue(), free_port()
    processes = [
        CONTEXT.Process(target=collect, args=(rank, world_size, port, device, function, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=180) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(world_size)]


def neighbours(world: World) -> list[np.ndarray]:
    lists: list[np.ndarray] = []
    for vectors in (exact_vectors(5000, 64), near_ties(403, 50)):
        half = -(-len(vectors) // world.size)
        own = vectors[world.rank * half : (world.rank + 1) * half]
        lists += ShardedIndex.build(own, world).search(vectors[:200], 21)
    return lists


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=needs_two)])
def test_exact_neighbours_are_those_of_brute_force(world_size: int) -> None:
    for scores, ids, near_scores, near_ids in on_ranks(neighbours, world_size, "cuda"):
        for vectors, found in ((exact_vectors(5000, 64), (scores, ids)), (near_ties(403, 50), (near_scores, near_ids))):
            wanted_scores, wanted_ids = brute_force(vectors[:200], vectors, 21)
            np.testing.assert_array_equal(found[1], wanted_ids)
            np.testing.assert_array_equal(found[0], wanted_scores)


def collectives(world: World) -> list[list[float]]:
    mine = torch.arange(6.0, device=world.device).view(6, 1) + 10 * world.rank
    counts = [2, 4] if world.rank == 0 else [5, 1]
    exchanged = world.all_to_all(mine, counts, [2, 5] if world.rank == 0 else [4, 1])
    found = [*world.all_gather_tensor(mine), exchanged, world.all_reduce(mine.clone()), world.all_reduce(mine, "max")]
    return [part.flatten().cpu().tolist() for part in found]


@needs_two
def test_nccl_comes_to_what_gloo_does() -> None:
    assert on_ranks(collectives, 2, "cuda") == on_ranks(collectives, 2, "cpu")
