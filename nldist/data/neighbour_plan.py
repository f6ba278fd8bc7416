"""Plans of pairs: anchors from the rank's own range, and neighbours of theirs from anywhere (docs/scanmix.md).

The neighbour graph is a memory-mapped file; a plan holds its path and opens it where it is used, so that data workers
share its pages and pickling sends no row of it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nldist.data.order import hash_ids
from nldist.data.plan import Part, Plan, shuffled, sweep


def neighbours(
    n: int,
    graph: Path,
    *,
    rank: int,
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    window: int | None,
    predicted: np.ndarray | None = None,
    include_self: bool = True,
    population: np.ndarray | None = None,
) -> Plan:
    """Anchors as in `shuffled`, and for each one neighbour; roles "anchors" and "neighbours", pair by pair.

    A neighbour is valid if it has the anchor's predicted class (the E-step of ScanMix, section 3.2); one is drawn
    uniformly from the valid ones, or from all where none is valid. The draw depends on (seed, epoch, anchor) alone, so
    it is the same for any world. The draw ids of both parts are the anchors' ids: what names the pair.

    Args:
        n: number of samples N of the data set.
        graph: the .npy file of the neighbour graph, integers (N, k).
        rank: this rank.
        size: number of ranks.
        batch_size: most anchors per step and rank.
        seed: the run's seed.
        epoch: the epoch's number.
        window: as in `shuffled`.
        predicted: (N,) predicted class of every id; None: every neighbour is valid.
        include_self: count the anchor among its neighbours.
        population: sorted ids of the anchors; all N by default.
    """
    anchors = shuffled(
        n,
        rank=rank,
        size=size,
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        window=window,
        population=population,
    )
    return _Neighbours(anchors, Graph(graph), predicted, include_self, (seed, epoch))


def nearest(
    n: int, graph: Path, k: int, *, rank: int, size: int, batch_size: int, population: np.ndarray | None = None
) -> Plan:
    """Every id of the population once, by its owner, with its `k` nearest neighbours; roles as in `neighbours`.

    The neighbours of one anchor stand together; the draw ids of their part are the anchor's id.
    """
    anchors = sweep(n, rank=rank, size=size, batch_size=batch_size, population=population)
    return _Nearest(anchors, Graph(graph), k)


def neighbourhoods(n: int, anchors: Plan, rows: np.ndarray, first: int) -> Plan:
    """Anchors with all their neighbours; roles "anchors" and "neighbours", those of one anchor together.

    Args:
        n: number of samples N of the data set.
        anchors: a plan of ids that this rank owns, role "all".
        rows: integers (owned, k), the neighbours of the ids that this rank owns.
        first: the first of these ids.

    The draw of an anchor's j-th neighbour is the anchor's plus j * N, j from 0: it names the pair.
    """
    return _Neighbourhoods(n, anchors, rows, first)


@dataclass
class Graph:
    """The rows of a neighbour graph's file, opened at first use."""

    path: Path
    _rows: np.ndarray | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": None}

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """The neighbours of `ids` (b,), nearest first, int64 (b, k)."""
        if self._rows is None:
            self._rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
        rows: np.ndarray = self._rows[ids].astype(np.int64)
        return rows


@dataclass
class _Neighbours:
    anchors: Plan
    graph: Graph
    predicted: np.ndarray | None
    include_self: bool
    key: tuple[int, int]

    @property
    def num_steps(self) -> int:
        return self.anchors.num_steps

    def step(self, k: int) -> dict[str, Part]:
        anchors = self.anchors.step(k)["all"]
        return {"anchors": anchors, "neighbours": Part(self._choose(anchors.ids), anchors.draws)}

    def _choose(self, ids: np.ndarray) -> np.ndarray:
        """One valid neighbour of each anchor."""
        candidates = self.graph.rows(ids)
        if self.include_self:
            candidates = np.concatenate([ids[:, None], candidates], axis=1)
        valid = np.ones(candidates.shape, bool)
        if self.predicted is not None:
            valid = self.predicted[candidates] == self.predicted[ids][:, None]
            valid[~valid.any(axis=1)] = True
        uniform = (hash_ids(ids, (*self.key, 1)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        # The chosen-th valid one: where the running count of valid ones first exceeds it.
        chosen = (uniform * valid.sum(axis=1)).astype(np.int64)
        place = (valid.cumsum(axis=1) > chosen[:, None]).argmax(axis=1)
        picked: np.ndarray = candidates[np.arange(len(ids)), place]
        return picked


@dataclass
class _Nearest:
    anchors: Plan
    graph: Graph
    k: int

    @property
    def num_steps(self) -> int:
        return self.anchors.num_steps

    def step(self, k: int) -> dict[str, Part]:
        anchors = self.anchors.step(k)["all"]
        rows = self.graph.rows(anchors.ids)[:, : self.k]
        return {"anchors": anchors, "neighbours": Part(rows.reshape(-1), anchors.draws.repeat(rows.shape[1]))}


@dataclass(frozen=True)
class _Neighbourhoods:
    n: int
    anchors: Plan
    neighbours: np.ndarray
    first: int

    @property
    def num_steps(self) -> int:
        return self.anchors.num_steps

    def step(self, k: int) -> dict[str, Part]:
        anchors = self.anchors.step(k)["all"]
        rows = self.neighbours[anchors.ids - self.first].astype(np.int64)
        draws = anchors.draws[:, None] + self.n * np.arange(rows.shape[1])
        return {"anchors": anchors, "neighbours": Part(rows.reshape(-1), draws.reshape(-1))}
