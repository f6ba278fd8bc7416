"""CIFAR-10 and CIFAR-100 in the Python distribution, whose pickles are read without running them as code."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from nldist.data.make.pickles import load_data
from nldist.data.make.sources.base import Listing
from nldist.errors import UserError

SPLITS = ("train", "test")


class _Layout(NamedTuple):
    meta: str  # the file with the class names
    names_key: str
    labels_key: str
    files: dict[str, list[str]]  # of each split


LAYOUT = (
    "CIFAR-10: batches.meta, data_batch_1 to data_batch_5, test_batch",
    "CIFAR-100: meta, train, test",
)
LAYOUTS = (
    _Layout(
        "batches.meta",
        "label_names",
        "labels",
        {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]},
    ),
    _Layout("meta", "fine_label_names", "fine_labels", {"train": ["train"], "test": ["test"]}),
)


@dataclass(frozen=True)
class CifarSource:
    """`directory` holds the batch files, or is the parent of the directory that does.

    CIFAR-100 gets its 100 fine labels. A path is BATCH/ROW, so a label file in the original order still fits.
    """

    kind: ClassVar[str] = "cifar"
    directory: Path
    split: str

    def listing(self) -> Listing:
        """List the split, reading all its batches."""
        folder, layout = self._layout()
        classes = [_text(name) for name in _entry(folder / layout.meta, layout.names_key)]
        paths, labels = [], []
        for file in layout.files[self.split]:
            batch = np.asarray(_entry(folder / file, layout.labels_key), np.int32)
            if batch.ndim != 1 or len(batch) != len(_pixels(folder / file)):
                raise UserError(f"{folder / file} has not one label per image")
            labels.append(batch)
            paths += [f"{file}/{row:05d}".encode() for row in range(len(batch))]
        return Listing.of(paths, np.concatenate(labels), classes)

    def read(self, path: bytes, max_bytes: int) -> np.ndarray:
        """One image, uint8 (32, 32, 3)."""
        file, row = path.decode().split("/")
        pixels = _pixels(self._layout()[0] / file)[int(row)]
        return np.ascontiguousarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0))

    def _layout(self) -> tuple[Path, _Layout]:
        folders = [
            self.directory,
            *(self.directory / name for name in ("cifar-10-batches-py", "cifar-100-python")),
        ]
        found = [(folder, layout) for folder in folders for layout in LAYOUTS if (folder / layout.meta).is_file()]
        if len(found) != 1:
            raise UserError(
                f"{self.directory} must be the directory of CIFAR-10 (with batches.meta) or of CIFAR-100 (with meta)"
            )
        return found[0]


def sources(directory: Path) -> dict[str, CifarSource]:
    """Both splits."""
    return {split: CifarSource(directory, split) for split in SPLITS}


@cache
def _load(path: Path) -> dict[str, Any]:
    """The dictionary in a batch file. Cached: each process reads a file once (30 MB a batch)."""
    try:
        with path.open("rb") as file:
            content = load_data(file)
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{path} is no CIFAR file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no CIFAR file: it holds no dictionary")
    return {_text(key): value for key, value in content.items()}


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _entry(path: Path, key: str) -> list[Any]:
    value = _load(path).get(key)
    if not isinstance(value, list):
        raise UserError(f"{path} is no CIFAR file: it has no list '{key}'")
    return value


def _pixels(path: Path) -> np.ndarray:
    pixels = _load(path).get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise UserError(f"{path} is no CIFAR file: 'data' must be uint8 of shape (N, 3072)")
    return pixels
