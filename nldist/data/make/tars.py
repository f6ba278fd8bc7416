"""One pass over a tar from a file or a URL: members with their offsets, and a checksum of the whole."""

import hashlib
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import IO, BinaryIO, cast

from nldist.data.remote import RemoteFile, is_url

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
BUFFER = 2**20
STEP = 2**16  # tarfile copies what is left of it at every read


class DamagedTarError(Exception):
    """A tar that cannot be read to its end; the message says how far and why."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar, or a link; `offset` (bytes) is where its data begin.

    `target` is the name of the member whose data are a link's. `is_sparse`: the data have holes and are not there as
    they are read.
    """

    name: str
    offset: int
    size: int
    stream: IO[bytes] | None
    target: str | None = None
    is_sparse: bool = False

    def read(self) -> bytes:
        """The data; only of a file, and while the reader stands at it. Raises DamagedTarError."""
        assert self.stream is not None
        try:
            return self.stream.read()
        except (tarfile.TarError, OSError) as error:
            raise DamagedTarError(f"damaged in {self.name}: {error}") from None

    @property
    def key(self) -> str:
        """The name up to the first dot of its last part: WebDataset's key."""
        return split_name(self.name)[0]

    @property
    def extension(self) -> str:
        """All after that dot, in lower case; empty if there is none."""
        return split_name(self.name)[1]


def split_name(name: str, by_last_dot: bool = False) -> tuple[str, str]:
    """A member's key and extension (lower case): what is before and behind the first, or last, dot of its last part."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.rpartition(".") if by_last_dot and "." in base else base.partition(".")
    return folder + slash + key, extension.lower()


class TarReader:
    """Iterates over the members; then `num_bytes` and `sha256` describe the file as a whole."""

    def __init__(self, path: str) -> None:
        self._file = _HashingFile(_open(path))

    def __enter__(self) -> "TarReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Member]:
        """Yield the regular files and links in order.

        Raises:
            DamagedTarError: it is no tar (or a compressed one), is cut short, or has a broken header.
        """
        end = 0
        try:
            with tarfile.open(fileobj=cast(IO[bytes], self._file), mode="r|", bufsize=STEP) as tar:
                for info in tar:
                    if info.isreg():
                        stream = tar.extractfile(info)
                        yield Member(info.name, info.offset_data, info.size, stream, None, info.issparse())
                    elif info.issym() or info.islnk():
                        yield Member(info.name, info.offset_data, 0, None, _target(info))
                    tar.members = []  # type: ignore[attr-defined]
                end = tar.offset
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DamagedTarError(f"no uncompressed tar, or a damaged one: {error}") from None
        self._file.drain()
        if self._file.end_of_content > end:  # tarfile takes a broken header for the end of the archive
            raise DamagedTarError(f"no valid header at byte {end:,} of {self.num_bytes:,}")

    @property
    def num_bytes(self) -> int:
        """Size of the file, once iterated over."""
        self._file.drain()
        return self._file.num_bytes

    @property
    def sha256(self) -> str:
        """SHA-256 of the file (hexadecimal), once iterated over."""
        self._file.drain()
        return self._file.digest.hexdigest()


class _HashingFile:
    """Counts and hashes what is read, and remembers where the last byte that is not zero ended."""

    def __init__(self, file: BinaryIO | RemoteFile) -> None:
        self._file = file
        self.num_bytes = self.end_of_content = 0
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        content = len(data.rstrip(b"\0"))
        if content:
            self.end_of_content = self.num_bytes + content
        self.num_bytes += len(data)
        return data

    def drain(self) -> None:
        while self.read(BUFFER):
            pass

    def close(self) -> None:
        self._file.close()


def _target(link: tarfile.TarInfo) -> str:
    """The member that a link leads to: hard links have its name, symbolic ones the way from their own directory."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))


def _open(path: str) -> BinaryIO | RemoteFile:
    return RemoteFile(path) if is_url(path) else open(path, "rb")
