"""Rows of all ranks: gathered with gradient, averaged, and shuffled over the ranks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nldist.data.index import owned
from nldist.dist.world import World


def row_counts(num_rows: int, world: World) -> list[int]:
    """How many rows each rank has. A collective."""
    counts = torch.zeros(world.size, dtype=torch.int64)
    counts[world.rank] = num_rows
    numbers: list[int] = world.all_reduce(counts).tolist()
    return numbers


def first_row(counts: Sequence[int], world: World) -> int:
    """Where this rank's rows begin among those of all ranks."""
    return sum(counts[: world.rank])


def gather_rows(rows: Tensor, world: World, counts: Sequence[int] | None = None) -> Tensor:
    """Every rank's rows in rank order, with gradient. A collective, in the forward and in the backward pass.

    The gradient that reaches this rank's rows is the sum of the gradients that all ranks have for them: under
    DDP's averaging, a loss on the gathered rows has the gradient of the mean of the ranks' losses.

    Args:
        rows: (b, ...), b may differ between the ranks.
        world: the ranks.
        counts: every rank's b (see `row_counts`), where it is known already.

    Returns:
        (sum of b, ...).
    """
    if world.size == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, world, counts or row_counts(len(rows), world))  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, counts: Sequence[int]) -> Tensor:
        ctx.world, ctx.counts = world, counts
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        everyone = world.all_gather_tensor(padded)
        return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # Not reduce_scatter, which wants parts of one size.
        total = ctx.world.all_reduce(gradient.clone(memory_format=torch.contiguous_format))
        start = first_row(ctx.counts, ctx.world)
        return total[start : start + ctx.counts[ctx.world.rank]], None, None


def global_mean(values: Tensor, counts: Sequence[int], world: World) -> Tensor:
    """This rank's share of the mean of all ranks' `values` (b,), of which rank r has `counts[r]`.

    The mean of the shares over the ranks is the global mean; under DDP's averaging its gradient is exact, also
    where the ranks have different numbers of rows.
    """
    return values.sum() * (world.size / sum(counts))


class Exchange:
    """One shuffle of rows over all ranks, and its inverse.

    Each rank sends an equal share (to one row) of its rows, in random order, to every rank. With one rank the
    rows change their order only.

    Args:
        counts: every rank's number of rows.
        world: the ranks.
        generator: this rank's randomness.
    """

    def __init__(self, counts: Sequence[int], world: World, generator: np.random.Generator) -> None:
        self._world = world
        self._order = torch.from_numpy(generator.permutation(counts[world.rank]))
        self._sent = [_share(counts[world.rank], world.rank, other, world.size) for other in range(world.size)]
        self._received = [_share(count, other, world.rank, world.size) for other, count in enumerate(counts)]

    def shuffle(self, rows: Tensor) -> Tensor:
        """Rows (b', ...) from all ranks, of equal shares, for this rank's `rows` (b, ...). A collective."""
        return self._world.all_to_all(rows[self._order.to(rows.device)], self._sent, self._received)

    def restore(self, rows: Tensor) -> Tensor:
        """What other ranks made of this rank's rows, (b, ...) in their first order, for (b', ...). A collective."""
        back = self._world.all_to_all(rows, self._received, self._sent)
        restored = torch.empty_like(back)
        restored[self._order.to(rows.device)] = back
        return restored


def _share(count: int, source: int, target: int, size: int) -> int:
    """How many of its `count` rows `source` sends to `target`.

    Counted from the source on, so that the ranks that get a row more are others for each source.
    """
    return len(owned(count, (target - source) % size, size))
