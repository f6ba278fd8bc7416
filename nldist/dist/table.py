"""Per-sample state: named columns by dense id, each row kept by the rank that owns the sample."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nldist.data.index import owned
from nldist.dist.checksums import Files
from nldist.dist.world import World

_BLOCK_BYTES = 1 << 22
_SLICE = re.compile(r"(?P<column>.+)\.(?P<start>\d{12})-(?P<stop>\d{12})\.npy")


class Column:
    """One value, or row of values, for every sample; this rank holds those of the samples that it owns.

        column[ids]            rows (b, ...) of owned ids, int64 (b,)
        column[ids] = rows     set them
        column.fetch(ids)      rows of any ids; a collective
        column.gather()        all rows (N, ...) on every rank; a collective

    Attributes:
        rows: (owned, ...), by ascending id.
        owned: the ids of the rows.
    """

    def __init__(self, rows: Tensor, num_samples: int, world: World, fill: float) -> None:
        self.rows, self.owned = rows, owned(num_samples, world.rank, world.size)
        self._num_samples, self._world, self._fill = num_samples, world, fill

    def __getitem__(self, ids: Tensor) -> Tensor:
        return self.rows[self._places(ids)]

    def __setitem__(self, ids: Tensor, rows: Tensor) -> None:
        self.rows[self._places(ids)] = rows.to(self.rows)

    def numpy(self) -> np.ndarray:
        """The owned rows of a column on the host as an array (owned, ...) that shares their memory."""
        array: np.ndarray = self.rows.numpy()
        return array

    def reset(self) -> None:
        """Set every owned row back to the fill value."""
        self.rows.fill_(self._fill)

    def gather(self) -> np.ndarray:
        """The whole column, (N, ...), on every rank. A collective."""
        return self._world.all_gather(self.rows.cpu().numpy())

    def fetch(self, ids: Tensor) -> Tensor:
        """The rows (b, ...) of any ids (b,), also of none; b may differ between the ranks. A collective."""
        if self._world.size == 1:
            return self[ids]
        world = self._world
        edges = [rank * self._num_samples // world.size for rank in range(world.size + 1)]
        order = ids.argsort()
        asked = torch.searchsorted(ids[order].cpu(), torch.tensor(edges)).diff()
        mine = torch.zeros(world.size, world.size, dtype=torch.int64)
        mine[world.rank] = asked
        counts = world.all_reduce(mine)  # row: who asks; column: whom
        sent, received = counts[world.rank].tolist(), counts[:, world.rank].tolist()
        wanted = world.all_to_all(ids[order].to(world.device), sent, received)
        # As bytes: gloo knows neither int16 nor bool.
        found = self[wanted].to(world.device).contiguous().view(-1).view(torch.uint8)
        answers = world.all_to_all(found.view(len(wanted), self.row_bytes), received, sent)
        rows = self.rows.new_empty((len(ids), *self.rows.shape[1:]))
        rows[order.to(rows.device)] = answers.to(rows.device).view(-1).view(self.rows.dtype).view(rows.shape)
        return rows

    @property
    def row_bytes(self) -> int:
        """State kept for each sample, in bytes."""
        return self.rows.element_size() * int(np.prod(self.rows.shape[1:], dtype=np.int64))

    def _places(self, ids: Tensor) -> Tensor:
        places = ids.to(self.rows.device) - self.owned.start
        if places.device.type == "cpu":  # a device would have to be waited for
            assert not len(places) or (places.min() >= 0 and places.max() < len(self.owned)), "ids of another owner"
        return places


class SampleTable:
    """Columns over the ids 0..N-1; this rank holds the rows [rank*N//size, (rank+1)*N//size)."""

    def __init__(self, num_samples: int, world: World) -> None:
        self.num_samples = num_samples
        self.owned = owned(num_samples, world.rank, world.size)
        self._world = world
        self._columns: dict[str, Column] = {}

    def add(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Sequence[int] = (),
        fill: float = 0,
        on: Literal["host", "device"] = "host",
    ) -> Column:
        """Add a column of rows with this dtype and shape, every value `fill`, in memory of the host or the device."""
        device = self._world.device if on == "device" else torch.device("cpu")
        rows = torch.full((len(self.owned), *shape), fill, dtype=dtype, device=device)
        self._columns[name] = Column(rows, self.num_samples, self._world, fill)
        return self._columns[name]

    def __getitem__(self, name: str) -> Column:
        """A column."""
        return self._columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    @property
    def bytes_per_sample(self) -> int:
        """State kept for each sample, in bytes."""
        return sum(column.row_bytes for column in self._columns.values())

    def save(self, files: Files, folder: str) -> None:
        """Write this rank's rows as one .npy file per column, named by its range of ids."""
        for name, column in self._columns.items():
            with files.create(f"{folder}/{name}.{self.owned.start:012d}-{self.owned.stop:012d}.npy") as file:
                np.save(file, column.rows.cpu().numpy())

    def load(self, directory: Path) -> None:
        """Read the owned rows from slices that any number of ranks wrote.

        A column of which there is no slice at all, as it came with a later nldist, keeps what it holds.

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
                    _read(path, low - start, column.rows[low - self.owned.start : high - self.owned.start])
                    num_read += high - low
            if num_read != len(self.owned) and any(match["column"] == name for match, _ in slices):
                raise ValueError(f"{directory}: column {name} holds {num_read} of {len(self.owned)} owned rows")


def _read(path: Path, first: int, rows: Tensor) -> None:
    """Read the rows of an .npy file from the `first` on into `rows`, of which there is no room for a second copy."""
    for block in blocks(rows):
        # Mapped anew each time: pages that have been read would stay this process's.
        part = np.load(path, mmap_mode="r", allow_pickle=False)[first : first + len(block)]
        block.copy_(torch.from_numpy(np.array(part)))
        first += len(block)


def blocks(rows: Tensor) -> Sequence[Tensor]:
    """Consecutive rows (b, ...) of a column's, each some MiB: to work on a copy of wide rows."""
    row_bytes = rows.element_size() * int(np.prod(rows.shape[1:], dtype=np.int64))
    return torch.split(rows, max(1, _BLOCK_BYTES // max(1, row_bytes)))


def slices_for(names: Iterable[str], rank: int, size: int) -> list[str]:
    """Those of the files that tables of all ranks were saved in, by name, that `load` reads on a rank of `size`."""
    matches = {name: match for name in names if (match := _SLICE.fullmatch(Path(name).name))}
    ranges = {name: range(int(match["start"]), int(match["stop"])) for name, match in matches.items()}
    mine = owned(max((ids.stop for ids in ranges.values()), default=0), rank, size)
    return [name for name, ids in ranges.items() if max(ids.start, mine.start) < min(ids.stop, mine.stop)]
