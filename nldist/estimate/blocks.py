"""Which vectors meet which, and when, in a search by pairs: the same for any number of ranks.

The ids 0..N-1 are divided into an odd number M of equal blocks. Block I meets the blocks I, I + 1, ... up to
I + (M - 1) / 2, counted round: so two blocks meet once, and every block meets as many. A rank sees to the rows that it
owns.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# Blocks at most. With more of them less would be multiplied twice, within a block (1 of 31), but each vector would
# travel more often.
_MAX_BLOCKS = 31


@dataclass(frozen=True)
class Meeting:
    """Ids of this rank, and the ids that each of them meets."""

    rows: range
    columns: range


class Blocks:
    """The blocks of N ids.

    Args:
        num_ids: N.
        least: ids of a block at least, where that leaves fewer blocks.
        part: ids of a block, about, that those of another meet in one step.

    Attributes:
        num_parts: of each block.
        num_meetings: steps in which all have met: of every block with a part of that `distance` blocks on.
    """

    def __init__(self, num_ids: int, *, least: int = 256, part: int = 4096) -> None:
        count = (min(_MAX_BLOCKS, max(1, num_ids // least)) - 1) // 2 * 2 + 1
        self._edges = [number * num_ids // count for number in range(count + 1)]
        self._size = max(1, num_ids // count)
        self.num_parts = max(1, -(-(self._size + 1) // part))
        self.num_meetings = (count + 1) // 2 * self.num_parts

    def num_turns(self, owned_by: Iterable[range]) -> int:
        """How often each rank has `meetings` in a step: as often as the one with the most rows."""
        return max(-(-len(owned) // self._size) for owned in owned_by)

    def meetings(self, owned: range, turn: int, distance: int, part: int) -> list[Meeting]:
        """What the rows of a rank, some at a turn, meet in a step; by ascending columns."""
        rows, count = owned[turn * self._size : (turn + 1) * self._size], len(self._edges) - 1
        found = [
            Meeting(common(rows, self._part(block, 0, 1)), self._part((block + distance) % count, part, self.num_parts))
            for block in self._of(rows)
        ]
        return sorted(found, key=lambda meeting: meeting.columns.start)

    def part_of_each(self, owned: range, part: int) -> list[range]:
        """A rank's ids in one part of every block."""
        ranges = (common(owned, self._part(block, part, self.num_parts)) for block in self._of(owned))
        return [ids for ids in ranges if ids]

    def _of(self, ids: range) -> range:
        """The blocks in which there are any of the ids."""
        if not ids:
            return range(0)
        return range(bisect_right(self._edges, ids.start) - 1, bisect_right(self._edges, ids.stop - 1))

    def _part(self, block: int, part: int, num_parts: int) -> range:
        ids = range(self._edges[block], self._edges[block + 1])
        return ids[len(ids) * part // num_parts : len(ids) * (part + 1) // num_parts]


def common(first: range, second: range) -> range:
    """The ids in both."""
    start = max(first.start, second.start)
    return range(start, max(start, min(first.stop, second.stop)))


def places(ranges: Iterable[range], owned: range) -> np.ndarray:
    """Where those ids of the ranges that are `owned` are among these, int64 (b,)."""
    parts = [common(ids, owned) for ids in ranges]
    return np.concatenate([np.empty(0, np.int64), *(np.arange(part.start, part.stop) - owned.start for part in parts)])


def cut(ids: range, size: int, among: int = 1) -> Sequence[range]:
    """The ids in pieces of at most `size`, which so many threads can share evenly.

    All but the last are of one length: a multiple of 64, as BLAS likes it.
    """
    if not ids:
        return []
    num_pieces = -(-len(ids) // (size * among)) * among
    length = min(size, -(-len(ids) // num_pieces // 64) * 64)
    return [ids[start : start + length] for start in range(0, len(ids), length)]
