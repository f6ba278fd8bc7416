"""Append-only files of JSON records, one per line, that survive a kill at any moment."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nldist.errors import UserError

BLOCK_BYTES = 1 << 16


class JsonLines:
    """Writes records to the end of a file. What a killed writer left of a last line is cut off first."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        cut_torn_line(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line, in strict JSON, and hand it to the operating system.

        JSON has no word for a number that is not finite: it is written as the string "NaN", "Infinity" or
        "-Infinity", as protobuf does. NumPy and torch scalars are written as the number that they hold.
        """
        line = json.dumps({key: to_json(value) for key, value in record.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield (record, byte offset just behind it) for every whole line from byte `offset` on.

    A last line without its end is left for later; a file that does not exist holds no lines.
    Raises `UserError` for a whole line that is not a JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _parse(line, path, offset - len(line)), offset


def to_json(value: Any) -> Any:
    """A value for strict JSON: NumPy and torch scalars unpacked, numbers that are not finite as strings."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def to_number(value: Any) -> float | None:
    """The number that a value read from a line stands for (`to_json`), or None if it is none."""
    if isinstance(value, int | float):
        return float(value)
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else None


def cut_torn_line(path: Path) -> None:
    """Shorten a file to the end of its last whole line."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        end = size
        while end > 0:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _parse(line: bytes, path: Path, offset: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}: the line at byte {offset} is not JSON ({error}): remove or mend it") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: the line at byte {offset} is not a JSON object: remove or mend it")
    return record
