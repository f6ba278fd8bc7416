"""What a raw layout must offer, and the listing that it returns."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import pyarrow as pa

from nldist.data.make.images import BadImageError
from nldist.errors import UserError


@dataclass(frozen=True)
class Listing:
    """All images of a split: `table` has columns path (large_binary) and label (int32), in any order.

    Arrow columns, because millions of Python strings would take gigabytes. `classes` names the labels.
    """

    table: pa.Table
    classes: list[str]

    @classmethod
    def of(cls, paths: Iterable[bytes] | pa.Array, labels: np.ndarray, classes: list[str]) -> "Listing":
        """Build a listing from paths (file-system bytes) and labels (N,)."""
        columns = {
            "path": pa.array(paths, pa.large_binary()),
            "label": pa.array(labels.astype(np.int32), pa.int32()),
        }
        return cls(pa.table(columns), classes)


class Source(Protocol):
    """A raw layout. Small and picklable: every worker process gets one, none gets the listing."""

    kind: ClassVar[str]

    def listing(self) -> Listing:
        """List every image of the split, or raise UserError saying what is wrong with the layout."""

    def read(self, path: bytes, max_bytes: int) -> bytes | np.ndarray:
        """One image, as its file's bytes or as uint8 pixels. Raises BadImageError or OSError."""


def read_file(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`, else raise BadImageError, or OSError if unreadable."""
    if b"\0" in os.fsencode(path):
        raise BadImageError("no such file: its name holds a zero byte")
    facts = os.stat(path)
    if not stat.S_ISREG(facts.st_mode):
        raise BadImageError("not a regular file")
    if facts.st_size > max_bytes:
        raise BadImageError(f"{facts.st_size:,} bytes are more than the limit of {max_bytes:,}")
    return path.read_bytes()


def read_class_names(path: Path) -> list[str]:
    """Read class names, one per line, from a text file; line k (from 0) names label k."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names in {path}: {error}") from None
    if not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"{path} must hold one class name per line, none empty and none twice")
    return names
