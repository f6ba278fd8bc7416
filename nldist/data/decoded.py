"""Decoded pixels of small images in a file of the node, so that each is decoded once."""

import hashlib
import importlib.metadata
import logging
import mmap
import os
import tempfile
import zlib
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
    """

    def __init__(self, path: Path, num_images: int, place: int) -> None:
        self._path, self._num_images, self._place = path, num_images, place
        self._begin = -(-num_images * _CHECKSUM.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
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
        mapped = self._open()
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
        if self._is_full:
            return
        file, data = self._open().file, np.ascontiguousarray(pixels).tobytes()
        checksum = np.array([zlib.crc32(data)], _CHECKSUM)
        try:
            # Not through the mapping: that would end the process where the disk is full.
            os.pwrite(file, data, self._begin + id_ * self._place)
            os.pwrite(file, checksum.tobytes(), id_ * _CHECKSUM.itemsize)
        except OSError as error:
            self._is_full = True
            _log.warning("decoded images are kept no more: %s: %s", self._path.parent, error.strerror)

    def _open(self) -> "_Mapped":
        """The file, opened once in each process."""
        if self._mapped is None:
            size = self._begin + self._num_images * self._place
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                os.ftruncate(file, size)  # holes, until images are written
                os.utime(file)
                whole = np.frombuffer(mmap.mmap(file, size, prot=mmap.PROT_READ), np.uint8)
            except OSError as error:
                problem = f"decoded images cannot be kept in {self._path.parent} ({error.strerror})"
                raise UserError(f"{problem}; set another data.cache_dir, or data.decoded_cache_gib=0") from None
            checksums = whole[: self._num_images * _CHECKSUM.itemsize].view(_CHECKSUM)
            self._mapped = _Mapped(file, checksums, whole[self._begin :].reshape(self._num_images, self._place))
        return self._mapped


class _Mapped(NamedTuple):
    """A cache's file, its checksums (N,) and its places (N, place), read-only."""

    file: int
    checksums: np.ndarray
    pixels: np.ndarray


def decoded_cache(index: Index, max_side: int, directory: Path | None, max_bytes: int) -> DecodedCache | None:
    """The decoded images of a split, where all of them fit `max_bytes`; else None.

    Args:
        index: the split.
        max_side: of decoded images (pixels).
        directory: where such files are kept, those used longest ago being removed for others; None: one of the user's
            own in the temporary directory.
        max_bytes: that all of them may have.

    Raises:
        UserError: the directory cannot be made.
    """
    place = _place(index, max_side)
    num_bytes = len(index) * (place + _CHECKSUM.itemsize)
    if num_bytes > max_bytes:
        return None
    folder = _made(directory)
    path = folder / f"{_key(index, max_side)}{_SUFFIX}"
    _make_room(folder, max_bytes - num_bytes, keep=path)
    return DecodedCache(path, len(index), place)


def _place(index: Index, max_side: int) -> int:
    """Bytes of the largest decoded image."""
    sizes = reduced(np.stack([index.height, index.width], axis=1).astype(np.int64), max_side)
    return int((3 * sizes.prod(axis=1)).max(initial=1))


def _key(index: Index, max_side: int) -> str:
    """Names what the pixels follow from: the files' bytes, their order, the reduction, the decoder."""
    facts = [index.name, index.split, str(len(index)), str(max_side), importlib.metadata.version("torchvision")]
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


def _make_room(folder: Path, num_bytes: int, keep: Path) -> None:
    """Remove the files used longest ago until no more than so many bytes are left, beside `keep`."""
    files = []
    for path in folder.glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            facts = path.stat()
            files.append((facts.st_mtime_ns, facts.st_size, path))
    excess = sum(size for _, size, path in files if path != keep) - num_bytes
    for _, size, path in sorted(files):
        if excess > 0 and path != keep:
            path.unlink(missing_ok=True)  # whoever has it open keeps it
            excess -= size
