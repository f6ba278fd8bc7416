"""Animal-10N (Song et al., ICML 2019): images whose names begin with the label, or its binary files."""

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from nldist.data.make.meaning import shown
from nldist.data.make.sources.base import Listing, is_clutter, read_file
from nldist.data.make.sources.lists import first_folder, lacks
from nldist.errors import UserError

CLASSES = ("cat", "lynx", "wolf", "coyote", "cheetah", "jaguar", "chimpanzee", "orangutan", "hamster", "guinea pig")
FOLDERS = {"train": ("training", "train"), "test": ("testing", "test")}
BATCHES = {"train": "data_batch_*.bin", "test": "test_batch*.bin"}
SIDE = 64
LAYOUT = (
    "training/0_1234.jpg and more, and testing/0_1234.jpg and more",
    "or the binary files data_batch_1.bin and more, and test_batch.bin",
)

_RECORD = np.dtype([("id", "u1", 4), ("label", "u1", 4), ("pixels", "u1", (3, SIDE, SIDE))])
_NAME = re.compile(r"([0-9])_.+")


@dataclass(frozen=True)
class AnimalImages:
    """A directory of images LABEL_NUMBER.jpg."""

    kind: ClassVar[str] = "animal10n"
    folder: Path

    def listing(self) -> Listing:
        """List the images; a file of another name is refused."""
        names = sorted(name for name in os.listdir(self.folder) if not is_clutter(name, False))
        labels = [_NAME.fullmatch(name) for name in names]
        others = [name for name, label in zip(names, labels, strict=True) if label is None]
        if others:
            raise UserError(f"{self.folder}: {shown(others)} do not begin with a label from 0 to 9, as in 0_1234.jpg")
        numbers = np.array([int(label[1]) for label in labels if label], np.int32)
        return Listing.of([os.fsencode(name) for name in names], numbers, list(CLASSES))

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes."""
        return read_file(self.folder / os.fsdecode(path), max_bytes)


@dataclass(frozen=True)
class AnimalBatches:
    """Binary files of records: 4 bytes of number, 4 of label, 64 x 64 pixels of red, of green and of blue.

    A path is FILE/ROW.
    """

    kind: ClassVar[str] = "animal10n"
    files: tuple[Path, ...]

    def listing(self) -> Listing:
        """List the records of all files."""
        paths, labels = [], []
        for file in self.files:
            records = _mapped(file)
            # The reader that the authors published takes labels for big-endian; a label is one byte in either order.
            labels.append(records["label"].sum(1, dtype=np.int32))
            if labels[-1].max(initial=0) >= len(CLASSES):
                raise UserError(f"{file} has a label above {len(CLASSES) - 1}: it is no file of Animal-10N")
            paths += [f"{file.name}/{row:05d}".encode() for row in range(len(records))]
        return Listing.of(paths, np.concatenate(labels), list(CLASSES))

    def read(self, path: bytes, max_bytes: int) -> np.ndarray:
        """One image, uint8 (64, 64, 3)."""
        name, row = path.decode().split("/")
        pixels = _records(self.files[0].with_name(name))[int(row)]["pixels"]
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def sources(root: Path) -> dict[str, AnimalImages | AnimalBatches]:
    """Both splits of Animal-10N in `root`, or in the one directory in it that is laid out so.

    Raises:
        UserError: something is missing.
    """
    folders = {split: first_folder([root / name for name in names]) for split, names in FOLDERS.items()}
    found = {split: AnimalImages(folder) for split, folder in folders.items() if folder is not None}
    if len(found) == len(FOLDERS):
        return dict(found)
    files = {split: tuple(sorted(root.glob(pattern), key=_number)) for split, pattern in BATCHES.items()}
    if all(files.values()):
        return {split: AnimalBatches(batches) for split, batches in files.items()}
    missing = [FOLDERS[split][0] for split in FOLDERS if split not in found]
    if any(files.values()):
        missing = [pattern.replace("*", "") for split, pattern in BATCHES.items() if not files[split]]
    raise lacks(root, missing, LAYOUT)


def _number(file: Path) -> int:
    return int("".join(re.findall("[0-9]+", file.stem)) or 0)


@cache
def _records(file: Path) -> np.ndarray:
    """The records of a file, mapped once in each process."""
    return _mapped(file)


def _mapped(file: Path) -> np.ndarray:
    size = file.stat().st_size
    if size == 0 or size % _RECORD.itemsize:
        raise UserError(f"{file} is no file of Animal-10N: {size:,} bytes are no multiple of {_RECORD.itemsize:,}")
    return np.memmap(file, _RECORD, "r")
