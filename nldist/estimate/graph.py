"""The k-nearest-neighbour graph of a data set: (N, k) int32, kept as one file that every rank writes its rows of."""

import contextlib
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from nldist.data.index import owned
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.estimate.neighbours import ShardedIndex, others, refuse_few
from nldist.estimate.pairs import PairSearch, num_candidates, num_steps
from nldist.estimate.shard import lengths

_ROWS = 65_536
_FEW_ROWS = 4_096  # of features, which are wide, and are copied in float64
_DTYPE = np.dtype("<i4")


def normalise(features: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Scale features (n, d) to length 1, float32, so that inner products are cosines.

    Zero vectors, which a network may well give after a ReLU, stay zero: their similarity to every vector is 0. `out`
    gets them, and may be `features` itself, where there is no room for both.
    """
    out = np.empty(features.shape, np.float32) if out is None else out
    for start in range(0, len(features), _FEW_ROWS):
        rows = torch.from_numpy(features[start : start + _FEW_ROWS].astype(np.float32))
        scale = lengths(rows)[:, None]
        out[start : start + _FEW_ROWS] = rows.double() / scale.where(scale != 0, 1.0)
    return out


def neighbours_of(index: ShardedIndex, ids: range, k: int) -> np.ndarray:
    """The k nearest other vectors of the indexed vectors `ids`, all owned by this rank; may be none. A collective.

    With an exact index the lists are exact, and the same for any number of ranks (ScanMix, section 3.2). A vector is
    told from its duplicates by its id. Where more than k + 1 are the same, it may not be in its own list.

    Returns:
        Ids (b, k) int32, by descending inner product, ties by ascending id.

    Raises:
        UserError: there are fewer than k + 1 vectors, or an approximate index found fewer.
    """
    refuse_few(index, k)
    _, found = index.search(index.vectors(ids), k + 1)
    neighbours = others(found, np.arange(ids.start, ids.stop)).astype(np.int32)
    short = np.flatnonzero((neighbours < 0).any(axis=1))
    if len(short):
        raise UserError(
            f"the index found fewer than {k} neighbours of {len(short)} samples, the first of them {ids[short[0]]}; "
            "raise num_probe"
        )
    return neighbours


def every_neighbour(index: ShardedIndex, k: int) -> np.ndarray:
    """`neighbours_of` all indexed vectors of this rank, (owned, k) int32. A collective.

    Of an exact index on the CPU each pair of vectors is multiplied once.
    """
    if not index.for_pairs:
        return neighbours_of(index, index.owned, k)
    shape = len(index.owned), num_candidates(k)
    search = PairSearch(index, k, np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32))
    graph = np.empty((len(index.owned), k), np.int32)
    for step in range(num_steps(index.num_vectors)):
        for ids, neighbours in search.step(step):
            graph[ids.start - index.owned.start : ids.stop - index.owned.start] = neighbours
    return graph


class GraphFile:
    """The graph of N samples being written: PATH.part, one .npy array (N, k) int32 with -1 where nothing is yet.

    Each rank writes its rows at their place in the file, in any order; `finish` gives it its name. A killed run
    leaves PATH.part, in which the next one goes on; or PATH itself, if it was killed after `finish` and before a
    checkpoint could say so. Creating a `GraphFile` is a collective.

    Raises:
        UserError: the file system refused (full disk, no permission); so do `write`, `flush` and `finish`.
    """

    def __init__(self, path: Path, num_samples: int, k: int, world: World) -> None:
        self._path, self._part, self._world = path, path.with_name(path.name + ".part"), world
        self._shape = num_samples, k
        self._rows = owned(num_samples, world.rank, world.size)
        self._header = _header(self._shape)
        with _refusals(path):
            if world.is_main and not self._fits(self._part):
                if self._fits(path):
                    os.replace(path, self._part)
                else:
                    self._create()
            world.barrier()
            self._file = self._part.open("r+b")

    def _fits(self, path: Path) -> bool:
        """Whether there is a file of this shape: then what it holds was written before a restart."""
        if not path.exists() or path.stat().st_size != self._offset(self._shape[0]):
            return False
        with path.open("rb") as file:
            return file.read(len(self._header)) == self._header

    def _create(self) -> None:
        """Under yet another name, so that a PATH.part always holds a neighbour or -1 at each place."""
        aside = self._part.with_name(self._part.name + ".new")
        with aside.open("wb") as file:
            file.write(self._header)
            for start in range(0, self._shape[0], _ROWS):
                np.full((min(_ROWS, self._shape[0] - start), self._shape[1]), -1, _DTYPE).tofile(file)
        os.replace(aside, self._part)

    def _offset(self, row: int) -> int:
        return len(self._header) + row * self._shape[1] * _DTYPE.itemsize

    def write(self, start: int, neighbours: np.ndarray) -> None:
        """Write the neighbours (b, k) of the samples `start` to `start + b - 1`."""
        assert neighbours.shape[1:] == self._shape[1:]
        assert start + len(neighbours) <= self._shape[0]
        with _refusals(self._path):
            self._file.seek(self._offset(start))
            self._file.write(np.ascontiguousarray(neighbours, _DTYPE).data)

    def flush(self) -> None:
        """Make what this rank wrote survive the loss of its node: to be done before a checkpoint says it is there."""
        with _refusals(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Give the complete file its name. A collective.

        Raises:
            UserError: rows were never written, on any rank.
        """
        self.flush()
        self._file.close()
        self._world.barrier()
        num_missing = int(self._world.all_reduce(torch.tensor(self._num_missing())))
        if num_missing:
            raise UserError(f"{self._part}: {num_missing} rows were not written; delete it and mine the graph again")
        with _refusals(self._path):
            if self._world.is_main:
                os.replace(self._part, self._path)
        self._world.barrier()

    def _num_missing(self) -> int:
        """Rows of this rank's even share that hold a -1."""
        rows = np.lib.format.open_memmap(self._part, mode="r")[self._rows.start : self._rows.stop]
        blocks = (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
        return sum(int((block < 0).any(axis=1).sum()) for block in blocks)


def open_graph(path: Path) -> np.memmap:
    """The finished graph (N, k) int32 at `path`, mapped read-only.

    Raises:
        UserError: there is none.
    """
    try:
        graph: np.memmap = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no neighbour graph ({error}); mine it first") from error
    return graph


def purity(graph: np.ndarray, ids: range, labels: np.ndarray, world: World) -> np.ndarray:
    """How often the neighbour at each position has its anchor's label, over the samples of all ranks. A collective.

    The mean of the first j values is the share among the nearest j neighbours.

    Args:
        graph: (owned, k) the neighbours of this rank's samples.
        ids: those samples.
        labels: (N,) of all samples.
        world: the ranks; together they have at least one sample.

    Returns:
        Shares (k,) float64, nearest first.
    """
    hits = np.zeros(graph.shape[1] + 1, np.int64)
    for start in range(0, len(ids), _ROWS):
        block = ids[start : start + _ROWS]
        same = labels[graph[start : start + _ROWS]] == labels[block.start : block.stop, None]
        hits[:-1] += same.sum(axis=0)
    hits[-1] = len(ids)
    total = world.all_reduce(torch.from_numpy(hits)).numpy()
    return np.asarray(total[:-1] / total[-1])


def _header(shape: tuple[int, int]) -> bytes:
    header = BytesIO()
    facts = {"descr": _DTYPE.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, facts)
    return header.getvalue()


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: the neighbour graph cannot be written ({error}); free some space") from error
