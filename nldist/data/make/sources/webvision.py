"""WebVision 1.0 (Li et al., 2017), original or resized: trees google/ and flickr/, validation images, info/."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

import numpy as np
import pyarrow as pa

from nldist.data.make.sources.base import Listing, read_file
from nldist.data.make.sources.lists import check_folders, first_folder, labelled, lacks, once, read_list
from nldist.errors import UserError

Part = Literal["google", "flickr", "all"]
PARTS: tuple[Part, ...] = get_args(Part)
SYNSETS, VAL_LIST = "synsets.txt", "val_filelist.txt"
VAL_FOLDERS = ("val_images_256", "val_images_resized", "val_images", "val/val_images_256", "val/val_images", "val")
LAYOUT = (
    "google/q0001/*.jpg and more",
    "flickr/q0001/*.jpg and more",
    f"{', '.join(VAL_FOLDERS[:3])} or val with val000001.jpg and more",
    "info/train_filelist_google.txt, info/train_filelist_flickr.txt, info/val_filelist.txt, info/synsets.txt",
)


@dataclass(frozen=True)
class WebVisionSource:
    """A split of WebVision: the images that `lists` name, of the first `num_classes` classes of `synsets`.

    Paths lie in `root`, but for those in the trees (google, flickr) that have a place of their own in `trees`.
    """

    kind: ClassVar[str] = "webvision"
    lists: tuple[Path, ...]
    synsets: Path
    root: Path
    trees: dict[bytes, Path]
    num_classes: int | None = None
    is_partial: bool = False

    def listing(self) -> Listing:
        """List the split; an image that is listed twice counts once, and is told."""
        classes = class_names(self.synsets, self.num_classes)
        parts = [read_list(file) for file in self.lists]
        paths, labels = pa.concat_arrays([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
        place = " and ".join(file.name for file in self.lists)
        has_label, notes = labelled(paths, labels, place)
        if self.num_classes is not None:
            has_label &= labels < self.num_classes
        paths, labels, more = once(paths.filter(pa.array(has_label)), labels[has_label], place)
        check_folders(self.root, paths, self._place, self.is_partial)
        return Listing.of(paths, labels, classes, [*notes, *more])

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes."""
        return read_file(self._place(path), max_bytes)

    def _place(self, path: bytes) -> Path:
        return self.trees.get(path.partition(b"/")[0], self.root) / os.fsdecode(path)


def sources(
    root: Path, num_classes: int | None = None, part: Part = "all", is_partial: bool = False
) -> dict[str, WebVisionSource]:
    """The splits of WebVision in `root`: all of it, or the first classes, or a part of the training images.

    Raises:
        UserError: something is missing, or there are not so many classes.
    """
    parts = ("google", "flickr") if part == "all" else (part,)
    info = root / "info" if (root / "info").is_dir() else root
    lists = {name: info / f"train_filelist_{name}.txt" for name in parts}
    trees = {name: _tree(root, name) for name in parts}
    val = first_folder([root / name for name in VAL_FOLDERS])
    files = [*lists.values(), info / VAL_LIST, info / SYNSETS]
    there = [name for name, tree in trees.items() if tree is not None]
    needless = f" (not needed with --part {there[0]})" if len(there) == 1 else ""
    missing = [f"{name}/{needless}" for name in parts if name not in there]
    missing += [] if val else [f"the validation images ({', '.join(VAL_FOLDERS[:3])} or val)"]
    missing += [f"info/{file.name}" for file in files if not file.is_file()]
    if missing or val is None:
        raise lacks(root, missing, LAYOUT)
    class_names(info / SYNSETS, num_classes)
    places = {os.fsencode(name): tree for name, tree in trees.items() if tree is not None}
    return {
        "val": WebVisionSource((info / VAL_LIST,), info / SYNSETS, val, {}, num_classes, is_partial),
        "train": WebVisionSource(tuple(lists.values()), info / SYNSETS, root, places, num_classes, is_partial),
    }


def class_names(file: Path, num_classes: int | None) -> list[str]:
    """Names of the first classes in synsets.txt: the synset and its first word, such as "n01440764 tench".

    Raises:
        UserError: the file cannot be read, or has fewer classes.
    """
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    names = [" ".join([synset, *(words.partition(",")[0].strip() for words in rest)]) for synset, *rest in lines]
    if not names or (num_classes is not None and not 2 <= num_classes <= len(names)):
        raise UserError(f"--classes must be from 2 to the {len(names):,} that {file} has, not {num_classes}")
    return names[:num_classes]


def _tree(root: Path, part: str) -> Path | None:
    """The directory that holds the tree of a part."""
    places = (root, root / "train", root / f"{part}_resized_256")
    return next((place for place in places if (place / part).is_dir()), None)
