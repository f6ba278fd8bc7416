"""Parts of a run for benchmarks/rehearsal.py, on ranks that stand for those of a run: seconds of each call.

    python benchmarks/rehearsal_ranks.py PART DATA OUT     (RANK, WORLD_SIZE and so on say which rank it is)

Rank 0 writes the seconds, by name, as JSON to OUT; every part is its slowest rank's.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rehearsal_data import DIM, factory

from nldist.data import plan
from nldist.data.index import Index, owned
from nldist.data.plan import Plan
from nldist.dist.table import Column
from nldist.dist.world import World
from nldist.estimate.beta_mixture import fit_beta
from nldist.estimate.mixture import fit, normalise
from nldist.estimate.neighbours import ShardedIndex
from nldist.methods.forward import estimate_transition

_BLOCK = 4096

Timed = Callable[[str, Callable[[], object]], object]


def main() -> None:
    """Run one part."""
    part, data, out = sys.argv[1:]
    with World.start(num_threads=1, device="cpu") as world:
        found: dict[str, float] = {}

        def timed(name: str, call: Callable[[], object]) -> object:
            world.barrier()
            began = time.perf_counter()
            result = call()
            seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
            found[name] = float(world.all_reduce(seconds, "max"))
            return result

        {"plans": plans, "mixtures": mixtures, "index": index, "transition": transition}[part](
            Index.open(data, "train"), world, timed
        )
        if world.is_main:
            Path(out).write_text(json.dumps(found))


def plans(data: Index, world: World, timed: Timed) -> None:
    """Each kind of plan made, and asked for all of its steps."""
    n, windows = len(data), {"shuffled": 16_384, "shuffled, whole": None}
    clean = np.random.default_rng(0).random(n) < 0.6
    labelled, unlabelled = np.flatnonzero(clean), np.flatnonzero(~clean)
    place: dict[str, Any] = {"rank": world.rank, "size": world.size}
    common: dict[str, Any] = {**place, "batch_size": 64, "seed": 0, "epoch": 0}
    timed("plan sweep", lambda: _all_steps(plan.sweep(n, **place, batch_size=1024)))
    for name, window in windows.items():
        timed(f"plan {name}", partial(lambda window: _all_steps(plan.shuffled(n, **common, window=window)), window))
    timed("plan divided", lambda: _all_steps(plan.divided(n, labelled, unlabelled, **common, window=16_384)))
    timed("plan balanced", lambda: plan.balanced(data.labels(), n // 10, seed=0, epoch=0, num_classes=data.num_classes))


def _all_steps(made: Plan) -> None:
    for step in range(made.num_steps):
        made.step(step)


def mixtures(data: Index, world: World, timed: Timed) -> None:
    """Losses of two kinds of labels, as of a network that has learnt a little."""
    mine = owned(len(data), world.rank, world.size)
    random = np.random.default_rng(world.rank)
    losses = np.where(random.random(len(mine)) < 0.6, random.gamma(2, 1, len(mine)), random.normal(9, 2, len(mine)))
    losses = losses.clip(0).astype(np.float32)

    def gaussian() -> None:
        values = normalise(losses, world)
        mixture = fit(values, world)
        assert mixture is not None
        mixture.clean_probability(values)

    timed("mixture", gaussian)
    timed("mixture, M-correction's", lambda: fit_beta(losses, world))


def index(data: Index, world: World, timed: Timed) -> None:
    """The inverted file over a vector of every sample, and a search for some of them."""
    own = _vectors(len(owned(len(data), world.rank, world.size)), world.rank)
    built = timed("index build", lambda: ShardedIndex.build(own, world, factory=factory(len(data)), num_probe=4))
    assert isinstance(built, ShardedIndex)
    timed("index search of 20,000", lambda: built.search(own[:10_000], 11))


def _vectors(num_vectors: int, rank: int) -> np.ndarray:
    """Vectors of length 1 around 1,000 places, float32; made in the place where they are kept."""
    out = np.empty((num_vectors, DIM), np.float32)
    spread = (1.0 + np.arange(DIM, dtype=np.float32)) ** -0.5  # falls off over the dimensions, as in learned features
    centres = np.random.default_rng(0).standard_normal((1000, DIM), np.float32)
    random = np.random.default_rng([1, rank])
    for start in range(0, num_vectors, _BLOCK):
        rows = out[start : start + _BLOCK]
        rows[:] = centres[random.integers(1000, size=len(rows))]
        rows += 0.7 * random.standard_normal(rows.shape, np.float32)
        rows *= spread
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return out


def transition(data: Index, world: World, timed: Timed) -> None:
    """Forward correction's matrix from a row of predictions of every sample."""
    mine = owned(len(data), world.rank, world.size)
    column = Column(torch.zeros(len(mine), data.num_classes, dtype=torch.float16), len(data), world, 0)
    draw = torch.Generator().manual_seed(world.rank)
    for start in range(0, len(mine), _BLOCK):
        rows = column.rows[start : start + _BLOCK]
        rows.copy_((3 * torch.randn(rows.shape, generator=draw)).softmax(1))
    timed("transition matrix", lambda: estimate_transition(column, 97, world))


if __name__ == "__main__":
    main()
