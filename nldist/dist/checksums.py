"""Checksums of a checkpoint's files: taken while they are written, compared before they are used.

CHECKPOINT/checksums.json   {"files": {NAME: [bytes, CRC-32]}} and, on a line of its own, the CRC-32 of that line
"""

import contextlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from nldist.errors import one_line

CHECKSUMS_FILE = "checksums.json"
_BLOCK_BYTES = 1 << 20

Sums = Mapping[str, tuple[int, int]]  # file's name -> bytes, CRC-32


class _Summed(io.RawIOBase):
    """A file that is being written, with its checksum so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.num_bytes, self.crc = file, 0, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.num_bytes, self.crc = self.num_bytes + len(view), zlib.crc32(view, self.crc)
        return self._file.write(view)


class Files:
    """Writes files into a directory, down to the disk, and keeps their checksums."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sums: dict[str, tuple[int, int]] = {}

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """The file `name` (with "/" for folders that exist), to be written."""
        with (self.directory / name).open("wb") as file:
            summed = _Summed(file)
            yield cast(IO[bytes], summed)
            file.flush()
            os.fsync(file.fileno())
        self.sums[name] = summed.num_bytes, summed.crc


def write_sums(directory: Path, sums: Sums) -> None:
    """Write the checksums of all of the directory's files beside them."""
    line = json.dumps({"files": dict(sorted(sums.items()))})
    with Files(directory).create(CHECKSUMS_FILE) as file:
        file.write(f"{line}\n{zlib.crc32(line.encode())}\n".encode())


def read_sums(directory: Path) -> Sums | None:
    """What `write_sums` wrote; None for a checkpoint of a release that wrote none.

    Raises:
        ValueError: the file is damaged, or cannot be read.
    """
    path = directory / CHECKSUMS_FILE
    if not path.exists():
        return None
    try:
        line, crc, rest = path.read_bytes().split(b"\n")
        if rest or zlib.crc32(line) != int(crc):
            raise ValueError("its own checksum is another")
        return {name: (size, crc) for name, (size, crc) in json.loads(line)["files"].items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{CHECKSUMS_FILE}: {one_line(error)}") from error


def differs(path: Path, num_bytes: int, crc: int) -> str | None:
    """How a file differs from what was written; None where it does not."""
    found = 0
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != num_bytes:
                return f"{size} bytes instead of {num_bytes}"
            while block := file.read(_BLOCK_BYTES):
                found = zlib.crc32(block, found)
    except OSError as error:
        return str(error.strerror)
    return None if found == crc else "another checksum"
