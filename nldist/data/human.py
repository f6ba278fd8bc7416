"""The human labels of CIFAR-10N and CIFAR-100N (Wei et al., ICLR 2022) from the files in which they are published.

Both kinds of file hold a pickled dictionary of arrays, which is read as data and never run.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from nldist.data.index import Index
from nldist.data.labels import CLEAN
from nldist.data.make.pickles import load_data
from nldist.errors import UserError

CLEAN_ENTRY = "clean_label"
ENTRIES = {
    "clean": (CLEAN_ENTRY,),
    "worst": ("worse_label",),
    "aggre": ("aggre_label",),
    "rand1": ("random_label1",),
    "rand2": ("random_label2",),
    "rand3": ("random_label3",),
    "clean100": (CLEAN_ENTRY,),
    "noisy100": ("noisy_label", "noise_label"),
}
"""What the authors' code calls the labels, and the entries of the files."""


def human_labels(index: Index, file: Path, name: str) -> np.ndarray:
    """The labels `name` (int32 (N,)) for CIFAR as `nldist shard cifar` writes it.

    `file` is a .pt file, in the order of CIFAR's Python distribution, or a .npy file, in that of TensorFlow Datasets
    and with the authors' image_order_*.npy beside it or a directory above. The clean labels in the file must be those
    of the data set, which shows that the order is right. Labels of CIFAR-100's 20 superclasses are not read.

    Raises:
        UserError: the file cannot be read, has no such labels, or is of another data set or order.
    """
    content = _content(file)
    found = {short: entry for short, entries in ENTRIES.items() for entry in entries if entry in content}
    wanted = found.get(name, name)
    if wanted not in found.values():
        both = [f"{short} ({entry})" for short, entry in found.items()]
        raise UserError(f"{file} has no labels {name!r} for the classes; it has {', '.join(both)}")
    if CLEAN_ENTRY not in content or any(len(labels) != len(index) for labels in content.values()):
        raise UserError(f"{file} is not about the {len(index):,} images of {index.root}/{index.split}")
    labels: np.ndarray = content[wanted][_places(index, file, content[CLEAN_ENTRY])]
    if labels.min() < 0 or labels.max() >= index.num_classes:
        raise UserError(f"{file}: {wanted} runs from {labels.min()} to {labels.max()}: not {index.num_classes} classes")
    return np.asarray(labels, np.int32)


def _places(index: Index, file: Path, clean: np.ndarray) -> np.ndarray:
    """For each id the position (N,) of its labels in the file."""
    true = index.labels(CLEAN if CLEAN in index.label_sets() else None)
    row_of_id = np.empty(len(index), np.int64)
    row_of_id[np.argsort(index.keys(range(len(index))))] = np.arange(len(index))  # BATCH/ROW: the original order
    if np.array_equal(clean[row_of_id], true):
        return row_of_id
    for order in _orders(file):
        place = np.empty(len(index), np.int64)  # the order says which row each label of the file is about
        place[order] = np.arange(len(index))
        if len(order) == len(index) and np.array_equal(clean[place][row_of_id], true):
            found: np.ndarray = place[row_of_id]
            return found
    num_wrong = np.count_nonzero(clean[row_of_id] != true)
    raise UserError(
        f"{file} is not about the images of {index.root} (from `nldist shard cifar`) in their order: {num_wrong:,} of "
        f"{len(index):,} clean labels differ. A .npy file also needs the authors' image_order_c10.npy or "
        "image_order_c100.npy beside it; the .pt file needs nothing"
    )


def _orders(file: Path) -> list[np.ndarray]:
    """The orders that lie beside a file: permutations of its rows."""
    paths = [path for folder in (file.parent, file.parent.parent) for path in sorted(folder.glob("image_order_*.npy"))]
    try:
        orders = [np.load(path, allow_pickle=False) for path in paths]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the orders beside {file}: {error}") from None
    return [order for order in orders if np.array_equal(np.sort(order, axis=None), np.arange(order.size))]


def _content(file: Path) -> dict[str, np.ndarray]:
    """The arrays of labels in a file, by name."""
    try:
        content = _from_npy(file) if file.suffix == ".npy" else _from_pt(file)
        return {str(name): np.asarray(labels, np.int64).reshape(-1) for name, labels in content.items()}
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(f"{file} is no file of CIFAR-10N or CIFAR-100N: {error}") from None


def _from_pt(file: Path) -> Any:
    """torch.save's archive: arrays are within its pickle."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        with archive.open(names[0] if names else "data.pkl") as pickled:
            return load_data(pickled)


def _from_npy(file: Path) -> Any:
    """numpy.save's file of one object: a header, and a pickled array that holds it."""
    with file.open("rb") as pickled:
        if np.lib.format.read_magic(pickled) != (1, 0):
            raise ValueError("its format is not 1.0")
        np.lib.format.read_array_header_1_0(pickled)
        return load_data(pickled).item()
