"""Images in one directory per class, as in ImageNet: ROOT/CLASS/.../FILE."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from nldist.data.make.sources.base import Listing, read_file
from nldist.errors import UserError


@dataclass(frozen=True)
class FolderSource:
    """`root` has one directory per class; classes are its sorted names.

    Every file below a class is listed, whatever its name: one that is no image gets refused by name later,
    rather than passed over in silence. Symbolic links are followed.
    """

    kind: ClassVar[str] = "folder"
    root: Path

    def listing(self) -> Listing:
        """List all files below the class directories."""
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not a directory")
        classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
        if not classes:
            raise UserError(f"{self.root} has no sub-directories; there must be one per class")
        parts = [pa.array(self._files(name), pa.large_binary()) for name in classes]
        labels = np.repeat(np.arange(len(classes)), [len(part) for part in parts])
        return Listing.of(pa.concat_arrays(parts), labels, classes)

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes."""
        return read_file(self.root / os.fsdecode(path), max_bytes)

    def _files(self, class_name: str) -> Iterator[bytes]:
        def fail(error: OSError) -> None:
            raise UserError(f"cannot list {error.filename}: {error.strerror}")

        root = os.fsencode(self.root)
        top = os.fsencode(self.root / class_name)
        for folder, _, names in os.walk(top, onerror=fail, followlinks=True):
            prefix = os.path.relpath(folder, root)
            yield from (os.path.join(prefix, name) for name in names)
