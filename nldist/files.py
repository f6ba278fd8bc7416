"""Files that are never half there."""

import contextlib
import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to. When all went well, and all is on disk, it becomes `path`; else it goes.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")  # no other process, on any node, has the same one
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    with replacing(path) as aside:
        aside.write_text(text)


def free_name(path: Path) -> Path:
    """`path`, with a number behind it where there is such a file."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in others if not other.exists())
