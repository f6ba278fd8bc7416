"""Images by id: positioned reads from the tars, decoding, and one padded batch of them."""

import math
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.data.cache import ShardCache
from nldist.data.decode import OFF_ALIGNMENT, DecodeError, decoded, reduced
from nldist.data.decoded import DecodedCache
from nldist.data.index import RECORD, Index
from nldist.data.remote import is_url, without_secrets
from nldist.errors import UserError

OnBad = Literal["skip", "refuse"]


class Row(NamedTuple):
    """A row of the index (`index.RECORD`) as plain numbers."""

    offset: int
    size: int
    shard: int
    label: int
    crc32: int
    height: int
    width: int


assert Row._fields == RECORD.names


@dataclass
class Images:
    """Decoded images of one part.

    Attributes:
        pixels: uint8 (b, H, W, 3) RGB, padded with zeros at the bottom and right.
        sizes: int64 (b, 2), each image's height and width.
        kept: int64 (b,), which of the wanted ids these are (positions); fewer than them where some were bad.
        bad: what was wrong with the others, one text each.
    """

    pixels: Tensor
    sizes: np.ndarray
    kept: np.ndarray
    bad: list[str]


class Reader:
    """Reads and decodes images of an index.

    Args:
        index: the split to read.
        on_bad: what to do about a damaged record: "skip" leaves it out and reports it, "refuse" raises.
        max_side: larger images are reduced until their longer side has this many pixels.
        cache: where remote shards are copied; needed only if there are any.
        decoded: where decoded images are kept; None: nowhere.
        num_open: at most this many shards are open at a time.
    """

    def __init__(
        self,
        index: Index,
        on_bad: OnBad,
        max_side: int,
        cache: ShardCache | None = None,
        decoded: DecodedCache | None = None,
        num_open: int = 64,
    ) -> None:
        self.index, self.on_bad, self.max_side, self._decoded = index, on_bad, max_side, decoded
        self._shards = _OpenShards(index, cache, num_open)

    def read(self, ids: np.ndarray, allocate: Callable[[tuple[int, ...]], Tensor] | None = None) -> Images:
        """The images of `ids`, in this order, in memory that `allocate` gives for a shape (uint8).

        Raises:
            UserError: a shard is missing; or, with on_bad="refuse", a record is damaged.
        """
        records = self.index.records[ids]
        sizes = reduced(np.stack([records["height"], records["width"]], axis=1).astype(np.int64), self.max_side)
        shape = len(ids), *(sizes.max(axis=0).tolist() if len(ids) else (1, 1)), 3
        pixels = (allocate or _empty)(shape)
        reasons = self._fill(ids, records, sizes, pixels)
        kept, bad = parted(len(ids), reasons, self.on_bad)
        if not bad:
            return Images(pixels, sizes, kept, bad)
        pixels[: len(kept)] = pixels[torch.from_numpy(kept)]
        return Images(pixels[: len(kept)], sizes[kept], kept, bad)

    def _fill(self, ids: np.ndarray, records: np.ndarray, sizes: np.ndarray, pixels: Tensor) -> dict[int, str]:
        """Put the images of `ids` into a batch; what was wrong with those that could not be, by position."""
        reasons: dict[int, str] = {}
        rows, missing = pixels.numpy(), np.arange(len(ids))
        if self._decoded is not None and len(ids):
            missing = np.flatnonzero(~self._decoded.take(ids, sizes, rows))
            if not len(missing):
                return reasons
        order = missing[np.lexsort((records["offset"][missing], records["shard"][missing]))]
        most_height, most_width = rows.shape[1:3]
        for place, fields, size in zip(order.tolist(), records[order].tolist(), sizes[order].tolist(), strict=True):
            row, (height, width) = Row(*fields), size
            into = rows[place, :height] if width == most_width else None
            try:
                image = self._image(row, height, width, into)
            except _BadRecordError as error:
                reasons[place] = self._describe(int(ids[place]), row, error)
                continue
            if image is not into:
                rows[place, :height, :width] = image
            if height < most_height or width < most_width:
                clear_beside(rows[place], height, width)
            if self._decoded is not None:
                self._decoded.keep(int(ids[place]), image)
        return reasons

    def close(self) -> None:
        """Close the open shards."""
        self._shards.close()

    def _image(self, row: Row, height: int, width: int, into: np.ndarray | None) -> np.ndarray:
        """One image, uint8 (height, width, 3): `into` if it was decoded there."""
        data = self._shards.read(row.shard, row.offset, row.size)
        # First: damaged JPEGs mostly decode without an error, and damaged PNGs can crash torchvision's decoder.
        if zlib.crc32(data) != row.crc32:
            raise _BadRecordError("its bytes are not those that were indexed (CRC-32)")
        indexed, size = (row.height, row.width), (height, width)
        try:
            image = decoded(data, into if indexed == size else None)
        except DecodeError as error:
            raise _BadRecordError(f"cannot be decoded ({error})") from error
        found = image.shape[:2]
        if found != indexed:
            raise _BadRecordError(f"is {found} pixels (height, width), the index says {indexed}")
        return image if found == size else shrunk(image, height, width)

    def _describe(self, id_: int, row: Row, reason: Exception) -> str:
        key = self.index.keys([id_])[0]
        place = without_secrets(self.index.shards[row.shard])
        return f"image {id_} ({key}) in {place} at byte {row.offset}: {reason}"


class _BadRecordError(Exception):
    """One record that cannot be used, and why."""


class _OpenShards:
    """Open files of the shards used last."""

    def __init__(self, index: Index, cache: ShardCache | None, num_open: int) -> None:
        self._index, self._cache, self._num_open = index, cache, num_open
        self._files: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_files": OrderedDict()}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The bytes of one record."""
        data, file = b"", self._file(shard)
        while len(data) < size:
            try:
                more = os.pread(file, size - len(data), offset + len(data))
            except OSError as error:
                raise _BadRecordError(f"cannot be read ({error.strerror})") from error
            if not more:
                raise _BadRecordError("its shard ends before it: the shard was cut short")
            data += more
        return data

    def close(self) -> None:
        while self._files:
            self._close_oldest()

    def _file(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            while len(self._files) >= self._num_open:
                self._close_oldest()
            file = self._open(shard)
            self._files[shard] = file
        self._files.move_to_end(shard)
        return file

    def _open(self, shard: int) -> int:
        place = self._index.shards[shard]
        if is_url(place):
            if self._cache is None:
                remote = without_secrets(place)
                raise UserError(f"{remote} is remote: set data.cache_dir to a directory for copies of such shards")
            return self._cache.open(place, self._index.shard_digests[shard], self._index.shard_sizes[shard])
        try:
            return os.open(place, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"shard {place}: {error.strerror}") from error

    def _close_oldest(self) -> None:
        shard, file = self._files.popitem(last=False)
        os.close(file)
        place = self._index.shards[shard]
        if self._cache is not None and is_url(place):
            self._cache.closed(place, self._index.shard_digests[shard])


def _empty(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(OFF_ALIGNMENT + math.prod(shape), dtype=torch.uint8)[OFF_ALIGNMENT:].view(shape)


def shrunk(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) to (height, width, 3), bilinear, antialiased: bit for bit as torchvision's `resize`."""
    batch = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    small = F.interpolate(batch, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
    out: np.ndarray = small[0].permute(1, 2, 0).numpy()
    return out


def parted(num_wanted: int, reasons: Mapping[int, str], on_bad: OnBad) -> tuple[np.ndarray, list[str]]:
    """The positions, int64, of the wanted images that are not in `reasons`, and those reasons in order.

    Raises:
        UserError: there is one, with on_bad="refuse".
    """
    bad = [reasons[place] for place in sorted(reasons)]
    if bad and on_bad == "refuse":
        raise UserError(f"{bad[0]}; repair it, or set data.on_bad=skip to leave such images out")
    return np.delete(np.arange(num_wanted), list(reasons)), bad


def clear_beside(pixels: np.ndarray, height: int, width: int) -> None:
    """Set what an image of this size, in the upper left corner of its place (H, W, 3), does not cover to zeros."""
    pixels[height:] = 0
    pixels[:height, width:] = 0
