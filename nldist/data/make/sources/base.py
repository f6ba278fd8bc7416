"""What a raw layout must offer, and the listing that it returns."""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import pyarrow as pa

from nldist.data.make.images import BadImageError
from nldist.errors import UserError

UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte-order marks, as spreadsheets write them
SYSTEM_FOLDERS = {".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class Listing:
    """All images of a split: `table` has columns path (large_binary) and label (int32), in any order.

    A column clean (int32), if there is one, has the true labels, which become the label set of this name. The columns
    are Arrow's, because millions of Python strings would take gigabytes. `classes` names the labels. `notes` say what
    was left out.
    """

    table: pa.Table
    classes: list[str]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        paths: Iterable[bytes] | pa.Array,
        labels: np.ndarray,
        classes: list[str],
        notes: Iterable[str] = (),
        clean: np.ndarray | None = None,
    ) -> "Listing":
        """Build a listing from paths (file-system bytes) and labels (N,), and the true ones if they are known (N,)."""
        columns = {
            "path": pa.array(paths, pa.large_binary()),
            "label": pa.array(labels.astype(np.int32), pa.int32()),
        }
        if clean is not None:
            columns["clean"] = pa.array(clean.astype(np.int32), pa.int32())
        return cls(pa.table(columns), classes, list(notes))


class Source(Protocol):
    """A raw layout. Small and picklable: every worker process gets one, none gets the listing."""

    kind: ClassVar[str]

    def listing(self) -> Listing:
        """List every image of the split, or raise UserError saying what is wrong with the layout."""

    def read(self, path: bytes, max_bytes: int) -> bytes | np.ndarray:
        """One image, as its file's bytes or as uint8 pixels. Raises BadImageError or OSError."""


def is_clutter(name: str, is_folder: bool) -> bool:
    """Whether a file or directory of this name is hidden, or one that a system leaves behind, and so no image or class.

    A file whose name merely begins with a dot may be an image.
    """
    if is_folder:
        return name.startswith(".") or name in SYSTEM_FOLDERS
    return name.startswith("._") or name in SYSTEM_FILES


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
        raw = path.read_bytes()
        text = raw.decode("utf-16" if raw[:2] in UTF_16 else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class names in {path}: {error}") from None
    names = [name.strip() for name in text.splitlines()]
    if not names or "" in names or len(set(names)) < len(names):
        raise UserError(f"{path} must hold one class name per line, none empty and none twice")
    return names
