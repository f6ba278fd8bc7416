"""A rank's slice of the ids, its shuffled order, and the ids' hashes: what plans are made of."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Ids:
    """A rank's ids: a range, or an array of its own (so that pickling never sends another rank's)."""

    first: int
    count: int
    array: np.ndarray | None

    @classmethod
    def of(cls, n: int, population: np.ndarray | None, positions: range) -> "Ids":
        """Those at `positions` of a population of the ids 0..n-1; None: all of them."""
        if population is None:
            return cls(positions.start, len(positions), None)
        dtype = np.int32 if n <= np.iinfo(np.int32).max else np.int64
        return cls(0, len(positions), population[positions.start : positions.stop].astype(dtype))

    def __len__(self) -> int:
        return self.count

    def take(self, positions: np.ndarray) -> np.ndarray:
        """The ids at `positions` (b,) of the slice, int64 (b,)."""
        if self.array is None:
            return positions + self.first
        ids: np.ndarray = self.array[positions].astype(np.int64)
        return ids


class Order:
    """A window-shuffled order of `count` positions, computed window by window.

    The windows' boundaries lie at another place each time, so that different records meet in a window.
    """

    def __init__(self, count: int, window: int | None, key: tuple[int, ...]) -> None:
        self.count, self.window, self.key = count, min(window or count, count), key
        self._layout: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._shuffled: tuple[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_layout": None, "_shuffled": None}

    def positions(self, begin: int, end: int) -> np.ndarray:
        """Entries `begin` to `end` of the order, int64."""
        if begin >= end:
            return np.empty(0, np.int64)
        _, _, ends = self._windows()
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        pieces = []
        for place in range(int(first), int(last) + 1):
            start = int(ends[place - 1]) if place else 0
            pieces.append(self._window(place)[max(begin - start, 0) : end - start])
        return np.concatenate(pieces)

    def _windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the windows in their shuffled order: first position, size, and where each ends in the order."""
        if self._layout is None:
            rng = np.random.default_rng((*self.key, 0))
            phase = int(rng.integers(self.window)) if self.window < self.count else 0
            edges = np.arange(-phase, self.count + self.window, self.window).clip(0, self.count)
            edges = edges[: np.searchsorted(edges, self.count) + 1]
            order = rng.permutation(len(edges) - 1)
            sizes = np.diff(edges)[order]
            self._layout = edges[:-1][order], sizes, np.cumsum(sizes)
        return self._layout

    def _window(self, place: int) -> np.ndarray:
        if self._shuffled is None or self._shuffled[0] != place:
            starts, sizes, _ = self._windows()
            rng = np.random.default_rng((*self.key, 1, place))
            self._shuffled = place, rng.permutation(sizes[place]) + starts[place]
        return self._shuffled[1]


def hash_ids(ids: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Distinct keys of the ids (b,), uint64 (b,): SplitMix64 from a place of its sequence that `key` names."""
    base: np.uint64 = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    z: np.ndarray = base + (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
