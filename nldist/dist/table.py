"""Per-sample state: named columns by dense id, each row kept by the rank that owns the sample."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from nldist.data.index import owned
from nldist.dist.world import World

_SLICE = re.compile(r"(?P<column>.+)\.(?P<start>\d{12})-(?P<stop>\d{12})\.npy")


class SampleTable:
    """Columns over the ids 0..N-1; this rank holds the rows [rank*N//size, (rank+1)*N//size).

    Updates go to the owner only. `gather` replicates a small column after a sweep with one all-gather.
    """

    def __init__(self, num_samples: int, world: World) -> None:
        self.num_samples = num_samples
        self.owned = owned(num_samples, world.rank, world.size)
        self._world = world
        self._columns: dict[str, np.ndarray] = {}
        self._fills: dict[str, float] = {}

    def add(self, name: str, dtype: DTypeLike, shape: Sequence[int] = (), fill: float = 0) -> None:
        """Add a column of rows with this dtype and shape, every value `fill`."""
        self._fills[name] = fill
        self._columns[name] = np.full((len(self.owned), *shape), fill, dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        """The owned rows of a column, shape (owned, ...); writable."""
        return self._columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def reset(self, name: str) -> None:
        """Set every owned row of a column back to its fill value."""
        self._columns[name][...] = self._fills[name]

    def put(self, name: str, ids: np.ndarray, values: np.ndarray) -> None:
        """Set the rows of `ids` (b,), all owned by this rank, to `values` (b, ...)."""
        self._columns[name][self._rows(ids)] = values

    def gather(self, name: str) -> np.ndarray:
        """The whole column, shape (N, ...), on every rank. A collective."""
        return self._world.all_gather(self._columns[name])

    @property
    def bytes_per_sample(self) -> int:
        """State kept for each sample, in bytes."""
        return sum(c.dtype.itemsize * int(np.prod(c.shape[1:], dtype=np.int64)) for c in self._columns.values())

    def save(self, directory: Path) -> None:
        """Write this rank's rows as one .npy file per column, named by its range of ids."""
        for name, column in self._columns.items():
            path = directory / f"{name}.{self.owned.start:012d}-{self.owned.stop:012d}.npy"
            with path.open("wb") as file:
                np.save(file, column)
                file.flush()
                os.fsync(file.fileno())

    def load(self, directory: Path) -> None:
        """Read the owned rows from slices that any number of ranks wrote.

        Raises:
            ValueError: a column's slices do not cover the rows that this rank owns.
        """
        slices = [(match, path) for path in directory.iterdir() if (match := _SLICE.fullmatch(path.name))]
        for name, column in self._columns.items():
            num_read = 0
            for match, path in slices:
                start, stop = int(match["start"]), int(match["stop"])
                low, high = max(start, self.owned.start), min(stop, self.owned.stop)
                if match["column"] == name and low < high:
                    part = np.load(path, mmap_mode="r", allow_pickle=False)[low - start : high - start]
                    column[low - self.owned.start : high - self.owned.start] = part
                    num_read += high - low
            if num_read != len(self.owned):
                raise ValueError(f"{directory}: column {name} holds {num_read} of {len(self.owned)} owned rows")

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        rows = ids - self.owned.start
        assert not len(rows) or (rows.min() >= 0 and rows.max() < len(self.owned)), "ids of another owner"
        return rows
