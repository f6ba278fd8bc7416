"""Sums over the samples of all ranks that do not depend on their partition.

They are taken in fixed point: each sample's contribution is rounded to a multiple of a power of two, after which
addition is exact and therefore has no order.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from nldist.dist.world import World

# Sums of a block are exact in float64: 2^14 integers of at most 2^38 stay below 2^53.
_BLOCK = 1 << 14
_MAX_BITS = 38


class Sums:
    """Order-independent sums over the samples of all ranks.

    Attributes:
        low, high: the extreme values.
        total: the sums of 1, x and x^2.
    """

    def __init__(self, values: np.ndarray, world: World) -> None:
        self._values, self._world = values, world
        num_outside = len(values) - int(np.count_nonzero((values >= 0) & (values <= 1)))
        num_samples, num_outside = world.all_reduce(torch.tensor([len(values), num_outside])).tolist()
        if num_outside:
            raise ValueError(f"{num_outside} of {num_samples} losses lie outside [0, 1]: normalise them first")
        self.low, self.high = extremes(values, world)
        # A sum must fit int64: num_samples * 2^bits < 2^63.
        self._scale = 2.0 ** min(_MAX_BITS, 63 - num_samples.bit_length())
        self.total = self.add(moments)

    def add(self, terms: Callable[[np.ndarray], tuple[np.ndarray, ...]]) -> list[float]:
        """Sum each of a block's terms, arrays (b,) between -1 and 1, over all values. A collective."""
        parts = (
            # Integers below 2^53: this sum is exact, in whatever order numpy takes it.
            [int(np.rint(term[:size] * self._scale).sum()) for term in terms(block)]
            for block, size in blocks(self._values)
        )
        sums = torch.tensor([sum(column) for column in zip(*parts, strict=True)])
        return [number / self._scale for number in self._world.all_reduce(sums).tolist()]


def blocks(values: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Cut (n,) values into float64 blocks (_BLOCK,), the last (or only) one padded, with their true sizes.

    Whole blocks keep numpy from treating the last few elements by other code than the rest, with other
    rounding, and small ones stay in the cache.
    """
    for start in range(0, max(len(values), 1), _BLOCK):
        part = values[start : start + _BLOCK]
        block = np.zeros(_BLOCK)
        block[: len(part)] = part
        yield block, len(part)


def extremes(values: np.ndarray, world: World) -> tuple[float, float]:
    """Smallest and largest value on any rank; infinities if there is none."""
    mine = [values.min(), -values.max()] if len(values) else [math.inf, math.inf]
    low, negative_high = world.all_reduce(torch.tensor(mine, dtype=torch.float64), "min").tolist()
    return low, -negative_high


def moments(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """1, x and x^2 of each value."""
    return np.ones_like(x), x, x * x
