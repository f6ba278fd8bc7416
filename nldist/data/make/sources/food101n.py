"""Food-101N (Lee et al., CVPR 2018), with the test images of Food-101 (Bossard et al., 2014)."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nldist.data.make.meaning import shown
from nldist.data.make.sources.base import Listing, read_class_names, read_file
from nldist.data.make.sources.lists import check_folders, lacks, once, read_list
from nldist.errors import UserError

NAMES, TRAIN_LIST, TEST_LIST = "meta/classes.txt", "meta/imagelist.tsv", "meta/test.txt"
HEADERS = ("class_name", "class_name/key")
LAYOUT = (
    "images/apple_pie/*.jpg and more",
    f"{NAMES}, {TRAIN_LIST}",
    f"and Food-101 (--food101), which holds images/apple_pie/*.jpg and more, {TEST_LIST}",
)


@dataclass(frozen=True)
class Food101nSource:
    """The images in `root`/images that `file` lists as CLASS/NAME, with `extension` behind the names."""

    kind: ClassVar[str] = "food101n"
    root: Path
    file: Path
    classes: tuple[str, ...]
    extension: str = ""
    is_partial: bool = False

    def listing(self) -> Listing:
        """List the split; the class of an image is its directory."""
        paths, _ = read_list(self.file)
        paths = paths.filter(pc.invert(pc.is_in(paths, pa.array([os.fsencode(name) for name in HEADERS], paths.type))))
        folders = pc.extract_regex(paths, r"^(?P<folder>[^/]+)/").field("folder").cast(pa.large_string())
        labels = pc.index_in(folders, pa.array(self.classes, pa.large_string())).fill_null(-1)
        unknown = folders.filter(pc.less(labels, 0)).unique().to_pylist()
        if unknown:
            raise UserError(f"{self.file} names classes that {NAMES} does not have: {shown(unknown)}")
        paths, labels, notes = once(paths, np.asarray(labels.to_numpy(), np.int32), self.file.name)
        check_folders(self.root, paths, self._place, self.is_partial)
        return Listing.of(paths, labels, list(self.classes), notes)

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes."""
        return read_file(self._place(path + self.extension.encode()), max_bytes)

    def _place(self, path: bytes) -> Path:
        return self.root / "images" / os.fsdecode(path)


def sources(root: Path, food101: Path | None = None, is_partial: bool = False) -> dict[str, Food101nSource]:
    """Both splits: Food-101N's images, and Food-101's test images.

    Raises:
        UserError: something is missing.
    """
    tests = [food101] if food101 else [root / "food-101", root.parent / "food-101"]
    test = next((place for place in tests if (place / TEST_LIST).is_file()), None)
    missing = [name for name in (NAMES, TRAIN_LIST) if not (root / name).is_file()]
    missing += [] if (root / "images").is_dir() else ["images/"]
    missing += [] if test else [f"Food-101 (no {TEST_LIST} in {' or '.join(map(str, tests))})"]
    if missing or test is None:
        raise lacks(root, missing, LAYOUT)
    names = [name for name in read_class_names(root / NAMES) if name not in HEADERS]
    return {
        "test": Food101nSource(test, test / TEST_LIST, tuple(names), ".jpg", is_partial),
        "train": Food101nSource(root, root / TRAIN_LIST, tuple(names), "", is_partial),
    }
