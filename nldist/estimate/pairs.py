"""The nearest neighbours of every vector among all, exactly, where each pair of vectors is multiplied once.

A score serves both of its vectors: it may enter the list of its row, which is here, and that of its column, which goes
back to its owner. Lists hold the best candidates by float32 scores; where these are too close, exact scores decide, as
in nldist.estimate.shard (docs/scanmix.md, "At full scale").
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nldist.estimate.blocks import Blocks, Meeting, common, cut, places
from nldist.estimate.neighbours import ShardedIndex, others, refuse_few
from nldist.estimate.shard import EXTRA, best, dots, lengths, rounding_error

# Scores of so many rows and columns are multiplied and scanned at a time: 4 MiB, about a core's cache.
_TILE = 1024
# Numbers of the candidates' vectors that are fetched at a time: 16 MiB.
_FETCHED = 1 << 22


def num_candidates(k: int) -> int:
    """Entries of the list from which the k nearest others are chosen."""
    return k + EXTRA


def num_steps(num_vectors: int) -> int:
    """Steps of a `PairSearch`: the same for any number of ranks, and almost equally long but the last few."""
    blocks = Blocks(num_vectors)
    return blocks.num_meetings + blocks.num_parts


class PairSearch:
    """The k nearest others of each vector of an exact index on the CPU, step by step.

    Args:
        index: of all vectors.
        k: neighbours of each.
        scores: float32 (owned, num_candidates(k)): the lists of this rank's vectors. They and `ids` are what the steps
            so far have found; -inf before the first one.
        ids: int32, the same shape; -1 before the first step.

    Raises:
        UserError: there are fewer than k + 1 vectors.
    """

    def __init__(self, index: ShardedIndex, k: int, scores: np.ndarray, ids: np.ndarray) -> None:
        from nldist.estimate import scan  # and with it numba

        refuse_few(index, k)
        self._scan, self._merge = scan.scan, scan.merge
        self._index, self._world, self._k = index, index.world, k
        self._blocks = Blocks(index.num_vectors)
        self._scores = torch.empty(torch.get_num_threads(), _TILE * _TILE, dtype=torch.float32)
        self._pool = ThreadPoolExecutor(len(self._scores))  # kept: BLAS on a new thread begins without its buffers
        self._lists = _Lists(scores, ids, scores[:, 0].copy())
        self._vectors = torch.from_numpy(index.vectors(index.owned))
        longest = torch.zeros(1, dtype=torch.float64)
        torch.amax(torch.cat([longest, lengths(self._vectors)]), 0, keepdim=True, out=longest)
        self._longest = float(self._world.all_reduce(longest, "max"))

    def step(self, step: int) -> Iterator[tuple[range, np.ndarray]]:
        """Do a step; gives what it completes, which is something in the last few steps. A collective.

        Yields:
            Ids of this rank, and their neighbours (b, k) int32 by descending inner product, ties by ascending id.
        """
        if step < self._blocks.num_meetings:
            self._meet(*divmod(step, self._blocks.num_parts))
        else:
            yield from self._decide(step - self._blocks.num_meetings)

    def _meet(self, distance: int, part: int) -> None:
        """Every vector meets one part of the block that is `distance` blocks on."""
        for turn in range(self._blocks.num_turns(self._index.owned_by)):
            everyone = [self._blocks.meetings(owned, turn, distance, part) for owned in self._index.owned_by]
            if distance:
                self._meet_others(everyone)
            else:  # both vectors of a pair meet the other
                columns = self._columns(everyone)[1]
                self._compare(everyone[self._world.rank], columns, _Lists.nothing_enters(len(columns), self._width))

    def _meet_others(self, everyone: Sequence[Sequence[Meeting]]) -> None:
        """Rows of each rank meet columns, whose lists go back to their owners."""
        (given, sent, received), columns = self._columns(everyone)
        least = self._world.all_to_all(torch.from_numpy(self._lists.least[given]), sent, received).numpy()
        found = _Lists.nothing_enters(len(columns), self._width)._replace(least=least)
        self._compare(everyone[self._world.rank], columns, found)
        scores, ids = (self._world.all_to_all(torch.from_numpy(column), received, sent).numpy() for column in found[:2])
        self._merge(given, scores, ids, *self._lists)

    def _columns(self, everyone: Sequence[Sequence[Meeting]]) -> tuple[tuple[np.ndarray, list[int], list[int]], Tensor]:
        """The columns of this rank's meetings, (c, d), in order of id.

        With them the places (s,) of those vectors that this rank has given others for theirs, how many to each rank,
        and how many each gave.
        """
        index = self._index
        given = [places([meeting.columns for meeting in meetings], index.owned) for meetings in everyone]
        sent = [len(part) for part in given]
        wanted = [meeting.columns for meeting in everyone[self._world.rank]]
        received = [sum(len(common(ids, owned)) for ids in wanted) for owned in index.owned_by]
        whole = np.concatenate(given)
        vectors = self._vectors.index_select(0, torch.from_numpy(whole))
        return (whole, sent, received), self._world.all_to_all(vectors, sent, received)

    def _compare(self, meetings: Sequence[Meeting], columns: Tensor, found: "_Lists") -> None:
        """Multiply and scan. The rows of a tile are one thread's, its columns while that scans them."""
        tasks: deque[tuple[range, Sequence[_Tile]]] = deque()
        start = 0
        for meeting in meetings:
            tiles = []
            for ids in cut(meeting.columns, _TILE):
                here = slice(start, start + len(ids))
                tiles.append(_Tile(ids, columns[here], found.part(here), threading.Lock()))
                start = here.stop
            for number, rows in enumerate(cut(meeting.rows, _TILE, len(self._scores))):
                first = number % max(1, len(tiles))  # threads begin at different tiles
                tasks.append((rows, tiles[first:] + tiles[:first]))
        self._on_threads(lambda scores: self._work(tasks, scores))

    def _on_threads(self, work: Callable[[Tensor], None]) -> None:
        """Do the work on as many threads as there are buffers, each of which multiplies by itself."""
        if len(self._scores) == 1:
            work(self._scores[0])
            return
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        done = [self._pool.submit(work, scores) for scores in self._scores]
        try:
            for thread in done:
                thread.result()
        finally:
            wait(done)  # they work on the lists, whatever interrupts this thread
            torch.set_num_threads(num_threads)

    def _work(self, tasks: deque[tuple[range, Sequence["_Tile"]]], scores: Tensor) -> None:
        """Compare rows with the tiles of columns that they meet, as long as there are any; `scores` is for a block."""
        while True:
            try:
                rows, tiles = tasks.popleft()
            except IndexError:
                return
            here = slice(rows.start - self._index.owned.start, rows.stop - self._index.owned.start)
            vectors, lists = self._vectors[here], self._lists.part(here)
            for tile in tiles:
                block = scores[: len(rows) * len(tile.ids)].view(len(rows), len(tile.ids))
                torch.mm(vectors, tile.vectors.T, out=block)
                with tile.lock:
                    self._scan(block.numpy(), rows.start, tile.ids.start, *lists, *tile.lists)

    def _decide(self, part: int) -> Iterator[tuple[range, np.ndarray]]:
        """The neighbours of one part of every block."""
        size = max(1, _FETCHED // (self._width * self._vectors.shape[1]))
        everyone = [
            [some for ids in self._blocks.part_of_each(owned, part) for some in cut(ids, size)]
            for owned in self._index.owned_by
        ]
        mine, owned = everyone[self._world.rank], self._index.owned
        for number in range(max(map(len, everyone))):
            ids = mine[number] if number < len(mine) else range(owned.start, owned.start)
            yield ids, self._nearest(ids)

    def _nearest(self, ids: range) -> np.ndarray:
        """The best k of each list (b, k), in order. A collective."""
        here = slice(ids.start - self._index.owned.start, ids.stop - self._index.owned.start)
        queries, lists = self._vectors[here], self._lists.part(here)
        error = rounding_error(queries, self._longest).numpy()
        order = np.argsort(-lists.scores, axis=1)[:, : self._k + 1]
        scores = np.take_along_axis(lists.scores, order, axis=1).astype(np.float64)
        neighbours = np.take_along_axis(lists.ids, order[:, : self._k], axis=1)
        # Where all are further apart than rounding can have moved them, exact scores would say the same.
        with np.errstate(invalid="ignore"):  # -inf less -inf
            close = ~(scores[:, :-1] - scores[:, 1:] > 2 * error[:, None]).all(axis=1)
        rows = np.flatnonzero(close)
        neighbours[rows] = self._exactly(queries[rows], lists.part(rows), error[rows], ids.start + rows)
        return neighbours

    def _exactly(self, queries: Tensor, lists: "_Lists", error: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The same of some lists by exact scores; a search where rounding could have kept one out. A collective."""
        distinct = np.unique(np.maximum(lists.ids, 0))
        vectors, known = torch.from_numpy(self._index.fetch(distinct)), torch.from_numpy(distinct)

        def score(queries: Tensor, rows: Tensor) -> Tensor:
            found = vectors.index_select(0, torch.searchsorted(known, rows.clamp(min=0)).flatten())
            return dots(queries, found.view(*rows.shape, queries.shape[1])).masked_fill_(rows < 0, -torch.inf)

        scores, nearest = best(queries, torch.from_numpy(lists.ids).long(), self._k, score)
        missed = lists.least + error >= scores[:, -1].numpy()
        doubtful = missed & (self._width < self._index.num_vectors - 1)
        neighbours = nearest.numpy().astype(np.int32)
        found = self._index.search(queries.numpy()[doubtful], self._k + 1)[1]
        neighbours[doubtful] = others(found, ids[doubtful])
        return neighbours

    @property
    def _width(self) -> int:
        return int(self._lists.ids.shape[1])


class _Lists(NamedTuple):
    """Lists of candidates as nldist.estimate.scan has them."""

    scores: np.ndarray
    ids: np.ndarray
    least: np.ndarray

    @classmethod
    def nothing_enters(cls, num_lists: int, width: int) -> "_Lists":
        """Empty lists."""
        scores = np.full((num_lists, width), -np.inf, np.float32)
        return cls(scores, np.full(scores.shape, -1, np.int32), np.full(num_lists, np.inf, np.float32))

    def part(self, rows: slice | np.ndarray) -> "_Lists":
        """Some of the lists: themselves, of a slice."""
        return _Lists(*(column[rows] for column in self))


class _Tile(NamedTuple):
    """Columns, and the lock that who scans them holds."""

    ids: range
    vectors: Tensor
    lists: _Lists
    lock: threading.Lock
