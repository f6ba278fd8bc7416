"""Images in one directory per class, as in ImageNet: ROOT/CLASS/.../FILE."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from nldist.data.make.meaning import in_order, meaning, shown
from nldist.data.make.sources.base import SYSTEM_FILES, Listing, is_clutter, read_file
from nldist.errors import UserError

_CLUTTER = (b"._", *map(os.fsencode, SYSTEM_FILES))


@dataclass(frozen=True)
class FolderSource:
    """`root` has one directory per class; classes are its sorted names.

    Every file below a class is listed, whatever its name: one that is no image gets refused by name later,
    rather than passed over in silence. Symbolic links are followed, but not in circles. What systems leave behind
    (hidden directories, `.DS_Store` and the like) is left out. `classes` names the classes and fixes their order, and
    some may then have no directory. `known` are those of the data set: where they are the same their order is kept.
    """

    kind: ClassVar[str] = "folder"
    root: Path
    classes: tuple[str, ...] | None = None
    known: tuple[str, ...] | None = None

    def listing(self) -> Listing:
        """List all files below the class directories."""
        folders, files = self._entries()
        classes, labels = self._classes(folders)
        left_out = LeftOut()
        root = os.fsencode(self.root)
        walks = (files_below(os.path.join(root, os.fsencode(name)), root, left_out) for name in folders)
        parts = [pa.array(walk, pa.large_binary()) for walk in walks]
        counts = [len(part) for part in parts]
        if self.classes is None:
            self._check_level(folders, counts)
        notes = left_out.notes()
        if files:
            notes.append(f"{len(files):,} files beside the class directories are in no class: {shown(files)}")
        return Listing.of(pa.concat_arrays(parts), np.repeat(labels, counts), classes, notes)

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes."""
        return read_file(self.root / os.fsdecode(path), max_bytes)

    def _entries(self) -> tuple[list[str], list[str]]:
        """The class directories, and the files beside them."""
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not a directory")
        entries = [entry for entry in os.scandir(self.root) if not is_clutter(entry.name, entry.is_dir())]
        folders = in_order(entry.name for entry in entries if entry.is_dir())
        if not folders:
            raise UserError(f"{self.root} has no sub-directories; there must be one per class")
        for name in folders:
            if any("\udc80" <= sign <= "\udcff" for sign in name):  # how Python writes bytes that are not UTF-8
                raise UserError(f"{self.root}: the class directory {name!a} has no name in UTF-8: rename it")
        return folders, sorted(entry.name for entry in entries if not entry.is_dir())

    def _classes(self, folders: list[str]) -> tuple[list[str], list[int]]:
        """The classes, and the label of each directory."""
        given = self.classes or self.known
        if given is None:
            return folders, list(range(len(folders)))
        found = meaning(str(self.root), folders, given, "names")
        labels = [found.class_of.get(name, -1) for name in folders]
        if self.classes is not None and found.faults:
            unknown = list(found.faults)
            raise UserError(f"{self.root}: {shown(unknown)} are directories of none of the classes {shown(given)}")
        if len(set(labels)) < len(labels) and not found.faults:
            raise UserError(f"{self.root}: two directories are of one class: {shown(folders)}")
        if self.classes is None and (found.faults or len(labels) < len(given)):
            return folders, list(range(len(folders)))  # other classes than the data set has: refused by name later
        return found.classes, labels

    def _check_level(self, folders: list[str], counts: list[int]) -> None:
        """Refuse a root above that of the classes: directories such as train and val that hold the same directories."""
        inner: Counter[str] = Counter()
        for name, count in zip(folders, counts, strict=True):
            entries = [entry for entry in os.scandir(self.root / name) if not is_clutter(entry.name, entry.is_dir())]
            if count == 0 or not all(entry.is_dir() for entry in entries):
                return
            inner.update(entry.name for entry in entries)
        twice = [name for name in inner if inner[name] == len(folders)]
        if twice:
            raise UserError(
                f"{self.root}: {shown(folders)} hold nothing but directories, all of them {shown(sorted(twice))}: if "
                f"those are the classes, give {self.root / folders[0]}; if not, list {shown(folders)} in --classes FILE"
            )


def files_below(top: bytes, root: bytes, left_out: "LeftOut") -> Iterator[bytes]:
    """All files below the directory `top`, by their paths below `root`; links are followed, but not in circles.

    Raises:
        UserError: a directory cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"cannot list {os.fsdecode(error.filename)}: {error.strerror}")

    for folder, inner, names in os.walk(top, onerror=fail, followlinks=True):
        prefix = os.path.relpath(folder, root)
        inner[:] = [name for name in sorted(inner) if not left_out.folder(folder, name, len(root))]
        left_out.files(prefix, names)
        yield from (os.path.join(prefix, name) for name in sorted(names))


@dataclass
class LeftOut:
    """What is not listed, to be told."""

    clutter: list[str] = field(default_factory=list)
    circles: list[str] = field(default_factory=list)

    def files(self, prefix: bytes, names: list[bytes]) -> None:
        """Take out the files that are none of the user's."""
        clutter = [name for name in names if name.startswith(_CLUTTER) and is_clutter(os.fsdecode(name), False)]
        for name in clutter:
            names.remove(name)
            self.clutter.append(os.fsdecode(os.path.join(prefix, name)))

    def folder(self, folder: bytes, name: bytes, root: int) -> bool:
        """Whether a directory is none of the user's, or a link to one that it lies in."""
        path = os.path.join(folder, name)
        shown_as = os.fsdecode(path[root:].lstrip(b"/"))
        if is_clutter(os.fsdecode(name), True):
            self.clutter.append(shown_as)
            return True
        if not os.path.islink(path) or not _is_circle(folder, os.path.realpath(path)):
            return False
        self.circles.append(shown_as)
        return True

    def notes(self) -> list[str]:
        """A line for each kind."""
        kinds = {
            "hidden directories and files of systems": self.clutter,
            "links to a directory that they lie in": self.circles,
        }
        return [f"{len(found):,} {kind} were left out: {shown(found)}" for kind, found in kinds.items() if found]


def _is_circle(folder: bytes, target: bytes) -> bool:
    """Whether `folder`, by any of the links that lead to it, lies in `target`."""
    while True:
        if os.path.join(os.path.realpath(folder), b"").startswith(os.path.join(target, b"")):
            return True
        parent = os.path.dirname(folder)
        if parent in (folder, b""):
            return False
        folder = parent
