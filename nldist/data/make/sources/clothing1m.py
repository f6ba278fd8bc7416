"""Clothing1M (Xiao et al., CVPR 2015) as its authors distribute it: key lists, label files, image folders."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from nldist.data.make.sources.base import Listing, read_class_names, read_file
from nldist.data.make.sources.lists import check_folders, labelled, labels_of, lacks, once, read_list
from nldist.errors import UserError

NAMES = "category_names_eng.txt"
NOISY, CLEAN = "noisy_label_kv.txt", "clean_label_kv.txt"
KEYS = {
    "val": "clean_val_key_list.txt",
    "test": "clean_test_key_list.txt",
    "clean_train": "clean_train_key_list.txt",
    "train": "noisy_train_key_list.txt",
}
"""The key list of each split."""

BOTH = "both"
"""The split of the images that have a noisy and a clean label."""

LAYOUT = (
    "images/0/00/A,B.jpg to images/9/99/A,B.jpg",
    "and beside images/, or in annotations/: " + ", ".join([*KEYS.values(), NOISY, CLEAN, NAMES]),
)
_IMAGES = "images/"


@dataclass(frozen=True)
class Clothing1mSource:
    """A split of Clothing1M in `root`: the annotations in `lists`, the directories 0 to 9 in `images`.

    In `train` the given labels are the noisy ones; in `clean_train`, `val` and `test` the clean ones, which accuracy is
    measured on. `both` has the images of the clean lists that have a noisy label, too: that one is given, and the clean
    one is the label set `clean`.
    """

    kind: ClassVar[str] = "clothing1m"
    split: str
    root: Path
    lists: Path
    images: Path
    is_partial: bool = False

    def listing(self) -> Listing:
        """List the split; an image without a label is left out, and told."""
        classes = read_class_names(self.lists / NAMES)
        if self.split == BOTH:
            return self._both(classes)
        kind = NOISY if self.split == "train" else CLEAN
        paths, _, notes = once(*read_list(self.lists / KEYS[self.split]), KEYS[self.split])
        labels = self._labels(kind, paths, notes)
        has_label, more = labelled(paths, labels, kind)
        paths, labels = paths.filter(pa.array(has_label)), labels[has_label]
        check_folders(self.root, paths, self._place, self.is_partial)
        return Listing.of(paths, labels, classes, [*notes, *more])

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes."""
        return read_file(self._place(path), max_bytes)

    def _place(self, path: bytes) -> Path:
        return self.images / os.fsdecode(path).removeprefix(_IMAGES)

    def _both(self, classes: list[str]) -> Listing:
        lists = [read_list(self.lists / KEYS[split])[0] for split in ("clean_train", "val", "test")]
        paths = pa.concat_arrays(lists).unique()
        notes: list[str] = []
        noisy, clean = (self._labels(kind, paths, notes) for kind in (NOISY, CLEAN))
        has_both = np.minimum(noisy, clean) >= 0
        if not has_both.any():
            raise UserError(f"no image of the clean lists in {self.lists} has a label in {NOISY}, too; is it whole?")
        paths = paths.filter(pa.array(has_both))
        check_folders(self.root, paths, self._place, self.is_partial)
        return Listing.of(paths, noisy[has_both], classes, notes, clean[has_both])

    def _labels(self, kind: str, paths: pa.Array, notes: list[str]) -> np.ndarray:
        """The labels of a file for `paths` (N,), and a note if it has an image twice."""
        keys, labels, more = once(*read_list(self.lists / kind), kind)
        notes += more
        return labels_of(paths, keys, labels)


def sources(root: Path, is_partial: bool = False) -> dict[str, Clothing1mSource]:
    """The splits of Clothing1M in `root`; missing directories of images are no fault if it `is_partial`.

    Raises:
        UserError: something is missing.
    """
    lists = root / "annotations" if (root / "annotations" / NOISY).exists() else root
    images = root / "images" if (root / "images").is_dir() else root
    missing = [name for name in (*KEYS.values(), NOISY, CLEAN, NAMES) if not (lists / name).is_file()]
    if not any((images / str(digit)).is_dir() for digit in range(10)):
        missing.insert(0, "images/0 to images/9")
    if missing:
        raise lacks(root, missing, LAYOUT)
    return {split: Clothing1mSource(split, root, lists, images, is_partial) for split in (*KEYS, BOTH)}
