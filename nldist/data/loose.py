"""Images that are in no data set: files, and members of tars, by their position in a list."""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nldist.data.decode import DecodeError, decoded, reduced
from nldist.data.make.images import BadImageError, Limits, normalise, plain_jpeg
from nldist.data.make.keys import readable
from nldist.data.make.sources.base import read_file
from nldist.data.reader import Images, OnBad, clear_beside, parted, shrunk

_LIMITS = Limits()
WHOLE = -1  # the size of what is a file of its own


class Place(NamedTuple):
    """Where an image lies.

    Attributes:
        path: of the file; of a tar's member, the tar's, a slash, and the member's name. The file system's bytes.
        num_tar: how many bytes of `path` name the tar; 0 where there is none.
        offset: where the member's bytes begin in the tar.
        size: how many there are; WHOLE of a file.
    """

    path: bytes
    num_tar: int = 0
    offset: int = 0
    size: int = WHOLE


_SCHEMA = pa.schema(
    [("path", pa.large_binary()), ("num_tar", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())]
)
_ROWS_PER_BATCH = 65_536


def write_places(file: Path, places: Iterable[Place]) -> None:
    """Write a list for `LooseImages`, a batch at a time."""
    rest = iter(places)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        while rows := list(islice(rest, _ROWS_PER_BATCH)):
            columns = zip(*rows, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))


class LooseImages:
    """N images, listed in a file that all processes of a node share as mapped memory.

    Pickling it sends the file's place only.

    Args:
        file: the list (`write_places`).
        resize: images whose short side (pixels) is longer are shrunk to it, as `nldist shard --resize` does.
    """

    def __init__(self, file: Path, resize: int | None = None) -> None:
        self._file, self.resize = file, resize
        self._table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def __reduce__(self) -> tuple[object, ...]:
        return LooseImages, (self._file, self.resize)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, id_: int) -> Place:
        return Place(*(column[id_].as_py() for column in self._table.columns))

    @property
    def label(self) -> np.ndarray:
        """Labels int32 (N,) that say nothing."""
        return np.broadcast_to(np.int32(0), len(self))

    def keys(self, ids: np.ndarray) -> list[str]:
        """The paths of `ids` as text."""
        column = self._table.column("path")
        return [readable(column[id_].as_py()) for id_ in ids.tolist()]


class LooseReader:
    """Reads and decodes them as if they had been sharded: turned upright, 8-bit RGB, transparent parts on white.

    Args:
        images: to read from.
        on_bad: what to do about an image that cannot be used: "skip" leaves it out and reports it, "refuse" raises.
        max_side: larger images are reduced until their longer side has this many pixels.
    """

    def __init__(self, images: LooseImages, on_bad: OnBad, max_side: int) -> None:
        self._images, self.on_bad, self.max_side = images, on_bad, max_side
        self._tar: tuple[bytes, int] | None = None  # the one read last, and its descriptor

    def read(self, ids: np.ndarray, allocate: Callable[[tuple[int, ...]], Tensor] | None = None) -> Images:
        """The images of `ids`, in this order, in memory that `allocate` gives for a shape (uint8).

        Raises:
            UserError: with on_bad="refuse", an image cannot be used.
        """
        found: list[np.ndarray] = []
        reasons: dict[int, str] = {}
        for position, id_ in enumerate(ids.tolist()):
            place = self._images[id_]
            try:
                found.append(image_of(self._raw(place), self._images.resize, self.max_side))
            except (BadImageError, DecodeError, OSError) as error:
                reasons[position] = f"{_in_one_line(place.path)}: {getattr(error, 'strerror', None) or error}"
        kept, bad = parted(len(ids), reasons, self.on_bad)
        return Images(*packed(found, allocate), kept, bad)

    def close(self) -> None:
        """Close the tar that is open."""
        if self._tar is not None:
            os.close(self._tar[1])
            self._tar = None

    def _raw(self, place: Place) -> bytes:
        if place.size == WHOLE:
            return read_file(Path(os.fsdecode(place.path)), _LIMITS.max_bytes)
        if place.size > _LIMITS.max_bytes:
            raise BadImageError(f"{place.size:,} bytes are more than the limit of {_LIMITS.max_bytes:,}")
        tar = place.path[: place.num_tar]
        if self._tar is None or self._tar[0] != tar:
            self.close()
            self._tar = tar, os.open(tar, os.O_RDONLY)
        return os.pread(self._tar[1], place.size, place.offset)


def image_of(raw: bytes, resize: int | None, max_side: int) -> np.ndarray:
    """The pixels of a file, uint8 (height, width, 3), as a run sees them that was given it in a shard.

    Args:
        raw: the file's bytes.
        resize: the shard's (`LooseImages`).
        max_side: the run's.

    Raises:
        BadImageError: it is no image, damaged, or too large.
        DecodeError: it cannot be decoded.
    """
    if plain_jpeg(raw, _LIMITS, resize) is None:
        raw = normalise(raw, _LIMITS, resize).data
    pixels = decoded(raw)
    height, width = reduced(np.array([pixels.shape[:2]]), max_side)[0].tolist()
    return pixels if (height, width) == pixels.shape[:2] else shrunk(pixels, height, width)


def packed(
    images: Sequence[np.ndarray], allocate: Callable[[tuple[int, ...]], Tensor] | None = None
) -> tuple[Tensor, np.ndarray]:
    """Images (h, w, 3) as the pixels and sizes of `Images`, in memory that `allocate` gives for a shape (uint8)."""
    sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)
    shape = len(images), *(sizes.max(axis=0).tolist() if images else (1, 1)), 3
    pixels = allocate(shape) if allocate else torch.empty(shape, dtype=torch.uint8)
    for place, image, (height, width) in zip(pixels.numpy(), images, sizes.tolist(), strict=True):
        place[:height, :width] = image
        clear_beside(place, height, width)
    return pixels, sizes


def _in_one_line(path: bytes) -> str:
    """A path as text that can be printed, whatever signs its names have."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in readable(path))
