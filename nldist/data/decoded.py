"""Decoded pixels of small images in a file of the node, so that each is decoded once."""

import hashlib
import importlib.metadata
import logging
import mmap
import os
import tempfile
import zlib
from collections.abc import Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nldist.data.decode import reduced
from nldist.data.index import Index
from nldist.errors import UserError

_log = logging.getLogger(__name__)
_SUFFIX = ".pixels"
_CHECKSUM = np.dtype("<u4")  # 0: the image is not there


class DecodedCache:
    """Images by id, each in a place of the same size; for all processes of a node, and for later runs.

    Each image's CRC-32 says that it is there, and is checked whenever it is read: what a crash has left half-written
    counts as absent. What the disk has no room for is not kept.

    Args:
        path: of the file, made if need be.
        num_images: N.
        place: bytes of the largest image.

    Attributes:
        path: of the file.
        num_bytes: that it has when all images are there.
    """

    def __init__(self, path: Path, num_images: int, place: int) -> None:
        self.path, self._num_images, self._place = path, num_images, place
        self._begin = -(-num_images * _CHECKSUM.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self.num_bytes = self._begin + num_images * place
        self._is_full = False
        self._mapped: _Mapped | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}

    def take(self, ids: np.ndarray, sizes: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Put the images that are there into a batch.

        Args:
            ids: int64 (b,).
            sizes: int64 (b, 2), their heights and widths.
            out: uint8 (b, H, W, 3); gets images in its upper left corner, zeros beside them; anything where the image
                is not there.

        Returns:
            bool (b,), which were there.
        """
        if (mapped := self._open()) is None:
            return np.zeros(len(ids), bool)
        checksums = mapped.checksums[ids]
        there: np.ndarray = checksums != 0
        if there.all() and out[0].nbytes == self._place and (sizes == out.shape[1:3]).all():
            rows = out.reshape(len(ids), self._place)
            np.take(mapped.pixels, ids, axis=0, out=rows, mode="clip")
            there[:] = checksums == [zlib.crc32(row.data) for row in rows]
            return there
        for place in np.flatnonzero(there).tolist():
            height, width = sizes[place]
            pixels = mapped.pixels[ids[place], : height * width * 3]
            there[place] = zlib.crc32(pixels.data) == checksums[place]
            out[place] = 0
            out[place, :height, :width] = pixels.reshape(height, width, 3)
        return there

    def keep(self, id_: int, pixels: np.ndarray) -> None:
        """Keep an image, uint8 (height, width, 3)."""
        if self._is_full or (mapped := self._open()) is None:
            return
        data = np.ascontiguousarray(pixels).tobytes()
        checksum = np.array([zlib.crc32(data)], _CHECKSUM)
        try:
            # Not through the mapping: that would end the process where the disk is full.
            if os.pwrite(mapped.file, data, self._begin + id_ * self._place) == len(data):
                os.pwrite(mapped.file, checksum.tobytes(), id_ * _CHECKSUM.itemsize)
        except OSError as error:
            self._give_up(error)

    def _open(self) -> "_Mapped | None":
        """The file, opened once in each process; None where it cannot be had."""
        if self._mapped is None and not self._is_full:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                os.ftruncate(file, self.num_bytes)  # holes, until images are written
                # Not of the checksums: in memory (tmpfs) reading a hole takes a page, and where there is none ends us.
                os.posix_fallocate(file, 0, self._begin)
                os.utime(file)
                whole = np.frombuffer(mmap.mmap(file, self.num_bytes, prot=mmap.PROT_READ), np.uint8)
            except OSError as error:
                self._give_up(error)
                return None
            checksums = whole[: self._num_images * _CHECKSUM.itemsize].view(_CHECKSUM)
            self._mapped = _Mapped(file, checksums, whole[self._begin :].reshape(self._num_images, self._place))
        return self._mapped

    def _give_up(self, error: OSError) -> None:
        self._is_full = True
        _log.warning("decoded images are kept no more: %s: %s", self.path.parent, error.strerror)


class _Mapped(NamedTuple):
    """A cache's file, its checksums (N,) and its places (N, place), read-only."""

    file: int
    checksums: np.ndarray
    pixels: np.ndarray


def decoded_cache(
    index: Index, max_side: int, directory: Path | None, max_bytes: int, beside: Sequence[DecodedCache] = ()
) -> DecodedCache | None:
    """The decoded images of a split, where all of them fit `max_bytes`; else None.

    Args:
        index: the split.
        max_side: of decoded images (pixels).
        directory: where such files are kept, this user's used longest ago being removed for others; None: a directory
            of the user's own in the temporary one.
        max_bytes: that all files of this user may have there.
        beside: the caches of other splits that are in use.

    Raises:
        UserError: the directory cannot be made.
    """
    folder = _made(directory)
    path = folder / f"{os.getuid()}-{_key(index, max_side)}{_SUFFIX}"
    cache = DecodedCache(path, len(index), _place(index, max_side))
    used = [cache, *beside]
    room = max_bytes - sum(one.num_bytes for one in used)
    if room < 0:
        return None
    _make_room(folder, room, keep={one.path for one in used})
    return cache


def _place(index: Index, max_side: int) -> int:
    """Bytes of the largest decoded image."""
    sizes = reduced(np.stack([index.height, index.width], axis=1).astype(np.int64), max_side)
    return int((3 * sizes.prod(axis=1)).max(initial=1))


def _key(index: Index, max_side: int) -> str:
    """Names what the pixels follow from: the files' bytes, their order, the reduction, the decoder."""
    decoders = map(importlib.metadata.version, ("simplejpeg", "torchvision"))
    facts = [index.name, index.split, str(len(index)), str(max_side), *decoders]
    digest = hashlib.sha256("\n".join(facts).encode())
    for column in (index.crc32, index.height, index.width):
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()[:16]


def _made(directory: Path | None) -> Path:
    """The directory, which is then this user's own where it is in the temporary directory."""
    folder = directory or Path(tempfile.gettempdir()) / f"nldist-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700 if directory is None else 0o777, parents=True, exist_ok=True)
        if directory is None and (folder.is_symlink() or folder.stat().st_uid != os.getuid()):
            raise UserError(f"{folder} is not yours: set data.cache_dir to a directory for decoded images")
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror}; set data.cache_dir to another place") from None
    return folder


def _make_room(folder: Path, num_bytes: int, keep: Set[Path]) -> None:
    """Remove this user's files used longest ago until no more than so many bytes are left, beside `keep`."""
    files = []
    for path in set(folder.glob(f"{os.getuid()}-*{_SUFFIX}")) - keep:
        with suppress(FileNotFoundError):
            facts = path.stat()
            files.append((facts.st_mtime_ns, facts.st_size, path))
    excess = sum(size for _, size, _ in files) - num_bytes
    for _, size, path in sorted(files):
        if excess > 0:
            with suppress(OSError):  # a further try is made by the next one that needs room
                path.unlink(missing_ok=True)  # whoever has it open keeps it
                excess -= size
