"""ILSVRC12's validation images (Russakovsky et al., 2015), by synset or flat, in the classes of WebVision."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from nldist.data.make.meaning import shown
from nldist.data.make.sources.base import Listing, is_clutter, read_file
from nldist.data.make.sources.lists import lacks
from nldist.data.manifest import read_dataset
from nldist.errors import UserError

SPLIT = "ilsvrc12"
SOLUTION = "LOC_val_solution.csv"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
PLACES = (".", "val", "ILSVRC2012_img_val", "imagenet/val", "ILSVRC/Data/CLS-LOC/val")
TRUTH_PLACES = (".", "ILSVRC2012_devkit_t12/data", "devkit/data", "data")
LAYOUT = (
    f"in itself or in {', '.join(PLACES[1:])}:",
    "n01440764/ILSVRC2012_val_00000293.JPEG and more, a directory for each synset",
    "or ILSVRC2012_val_00000001.JPEG and more, and in DIRECTORY or ILSVRC2012_devkit_t12/data: "
    f"{TRUTH} with {META}, or {SOLUTION}",
)
_SYNSET = re.compile(r"n\d{8}")
_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.\w+")


@dataclass(frozen=True)
class Ilsvrc12Source:
    """The validation images in `folder` of the synsets with which `classes` begin, such as "n01440764 tench".

    `truth` has the synset of each image where they are not in directories by synset.
    """

    kind: ClassVar[str] = "ilsvrc12"
    folder: Path
    classes: tuple[str, ...]
    truth: Path | None = None

    def listing(self) -> Listing:
        """List the images of these classes; those of others are left out, and told."""
        label_of = {name.split()[0]: label for label, name in enumerate(self.classes)}
        images = list(_in_folders(self.folder) if self.truth is None else _in_list(self.truth))
        missing = sorted(label_of.keys() - {synset for _, synset in images})
        if missing:
            raise UserError(f"{self.folder} has no images of {len(missing):,} synsets: {shown(missing)}")
        known = [(path, label_of[synset]) for path, synset in images if synset in label_of]
        num_others = len(images) - len(known)
        notes = [f"{num_others:,} images of other synsets were left out"] if num_others else []
        labels = np.array([label for _, label in known], np.int32)
        return Listing.of([os.fsencode(path) for path, _ in known], labels, list(self.classes), notes)

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes."""
        return read_file(self.folder / os.fsdecode(path), max_bytes)


def sources(root: Path, dataset: Path) -> dict[str, Ilsvrc12Source]:
    """The split for the data set at `dataset`, which must exist: its classes are those of the split.

    Raises:
        UserError: its classes are no synsets, or there are no validation images below `root`, or no labels for them.
    """
    classes = tuple(_classes_of(dataset))
    folders = [root / place for place in PLACES if (root / place).is_dir()]
    for folder in folders:
        if any(_SYNSET.fullmatch(entry.name) and entry.is_dir() for entry in os.scandir(folder)):
            return {SPLIT: Ilsvrc12Source(folder, classes)}
    flat = next(
        (folder for folder in folders if any(_IMAGE.fullmatch(entry.name) for entry in os.scandir(folder))), None
    )
    if flat is None:
        raise lacks(root, ["the validation images"], LAYOUT)
    truths = [root / place / name for place in TRUTH_PLACES for name in (SOLUTION, TRUTH)]
    truth = next((file for file in truths if file.is_file()), None)
    if truth is None:
        raise lacks(root, ["directories by synset and also the labels of the images"], LAYOUT)
    if truth.name == TRUTH and not truth.with_name(META).is_file():
        raise lacks(root, [f"{META} beside {TRUTH}"], LAYOUT)
    return {SPLIT: Ilsvrc12Source(flat, classes, truth)}


def _classes_of(dataset: Path) -> list[str]:
    how = f"make it with `nldist shard webvision DIRECTORY {dataset}` first"
    if not (dataset / "dataset.json").exists():
        raise UserError(f"ilsvrc12 is a split of a WebVision data set, and {dataset} is none yet: {how}")
    classes: list[str] = read_dataset(dataset)["classes"]
    if not all(_SYNSET.fullmatch(name.partition(" ")[0]) for name in classes):
        raise UserError(
            f"the classes of {dataset} do not begin with synsets such as n01440764: {shown(classes)}; {how}"
        )
    return classes


def _in_folders(folder: Path) -> Iterator[tuple[str, str]]:
    """The paths below `folder` and the synsets of images in directories by synset."""
    for synset in sorted(entry.name for entry in os.scandir(folder) if _SYNSET.fullmatch(entry.name)):
        for name in sorted(os.listdir(folder / synset)):
            if is_clutter(name, False):
                continue
            if not _IMAGE.fullmatch(name):  # of the training images, for example
                raise UserError(f"{folder / synset / name} is not named as validation images are (ILSVRC2012_val_...)")
            yield f"{synset}/{name}", synset


def _in_list(truth: Path) -> Iterator[tuple[str, str]]:
    """The paths and synsets of images beside each other."""
    try:
        yield from _in_solution(truth) if truth.name == SOLUTION else _in_ground_truth(truth)
    except (OSError, ValueError, KeyError, IndexError, csv.Error) as error:
        raise UserError(f"cannot read the labels in {truth}: {' '.join(str(error).split())}") from None


def _in_solution(file: Path) -> Iterator[tuple[str, str]]:
    """Kaggle's table: an image's name, and its boxes, each behind its synset."""
    with file.open(newline="", encoding="utf-8-sig") as rows:
        for row in csv.DictReader(rows):
            yield f"{row['ImageId']}.JPEG", row["PredictionString"].split()[0]


def _in_ground_truth(file: Path) -> Iterator[tuple[str, str]]:
    """The development kit's: line k has the number of image k, whose synset meta.mat has."""
    from scipy.io import loadmat

    synsets: Sequence = loadmat(file.with_name(META), squeeze_me=True)["synsets"]
    synset_of = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    for number, line in enumerate(file.read_text().split(), 1):
        yield f"ILSVRC2012_val_{number:08d}.JPEG", synset_of[int(line)]
