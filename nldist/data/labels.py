"""Label sets beside the shards, and the noise models that make them.

A noise experiment never rewrites images: it adds a label set, and the true labels are the label set `clean`.
The noise models are pure functions of (clean labels, seed) with the conventions of DivideMix, ScanMix and
SELC. A sample is known by its id, so the same seed on a data set that was sharded in another
order puts the noise on other images.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nldist.data.index import Index
from nldist.data.make.finish import rejected_of
from nldist.data.make.keys import keys_of, matched, plain
from nldist.data.make.lock import locked
from nldist.data.make.meaning import Reading
from nldist.data.make.sources.csv import classes_of, read_table
from nldist.data.manifest import writing
from nldist.errors import UserError

CLEAN = "clean"
CIFAR10_FLIPS = {
    "truck": "automobile",
    "bird": "airplane",
    "deer": "horse",
    "cat": "dog",
    "dog": "cat",
}
"""The classes that asymmetric noise confuses on CIFAR-10."""

_CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}
_MAX_TABLE_CLASSES = 20
_NUM_CONFUSIONS = 10
_NUM_EXAMPLES = 3


def symmetric(clean: np.ndarray, classes: list[str], rate: float, seed: int) -> np.ndarray:
    """Give int(rate * N) samples a class drawn from all C, the true one included.

    About rate * (C - 1) / C of the labels are wrong then. At another rate the same seed selects a subset or a
    superset of these samples and gives those in common the same labels.

    Args:
        clean: true labels, int32 (N,).
        classes: the C class names.
        rate: share of the samples that is selected, in [0, 1].
        seed: of the selection and the new labels.

    Returns:
        int32 (N,).

    Raises:
        UserError: `rate` is out of range.
    """
    selected = _select(len(clean), rate, seed)
    drawn = np.random.default_rng([seed, 1]).integers(len(classes), size=len(clean), dtype=np.int32)
    noisy = np.array(clean, np.int32)
    noisy[selected] = drawn[: len(selected)]
    return noisy


def asymmetric(clean: np.ndarray, classes: list[str], rate: float, seed: int) -> np.ndarray:
    """Move int(rate * N) samples to the class that theirs is mistaken for (arguments as for `symmetric`).

    CIFAR-10: `CIFAR10_FLIPS`, other classes stay, so that the share of wrong labels is about rate / 2.
    CIFAR-100: the next class inside groups of five consecutive ids.

    Raises:
        UserError: the data set has no such map, or `rate` is out of range.
    """
    num_classes = len(classes)
    target = np.arange(num_classes, dtype=np.int32)
    if set(classes) == _CIFAR10:
        for source, mistaken in CIFAR10_FLIPS.items():
            target[classes.index(source)] = classes.index(mistaken)
    elif num_classes == 100:
        target = 5 * (target // 5) + (target % 5 + 1) % 5
    else:
        raise UserError(
            "asymmetric noise has a class map for CIFAR-10 (by its class names) and CIFAR-100 (100 classes), "
            f"not for these {num_classes} classes: take symmetric or pairflip"
        )
    return _move(clean, target, rate, seed)


def pairflip(clean: np.ndarray, classes: list[str], rate: float, seed: int) -> np.ndarray:
    """Move int(rate * N) samples from class y to (y + 1) mod C (arguments as for `symmetric`)."""
    target = np.arange(1, len(classes) + 1, dtype=np.int32) % len(classes)
    return _move(clean, target, rate, seed)


NOISE_MODELS: dict[str, Callable[[np.ndarray, list[str], float, int], np.ndarray]] = {
    "symmetric": symmetric,
    "asymmetric": asymmetric,
    "pairflip": pairflip,
}
"""Noise models by name."""


def label_set_path(root: str | Path, split: str, name: str) -> Path:
    """Where the label set `name` lies; raises UserError if that is not a plain name."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
        raise UserError(f"{name!r} cannot name a label set: use letters, digits, '-', '_' and '.'")
    return Path(root) / split / "labels" / f"{name}.parquet"


def write_label_set(
    root: str | Path, split: str, name: str, labels: np.ndarray, origin: Mapping[str, Any] | None = None
) -> Path:
    """Write labels (N,), in the order of ids, as the label set `name` of a split.

    Writing the same labels again changes nothing. Where they are from, as plain values, is kept in the file's metadata
    (`nldist`, JSON).

    Raises:
        UserError: a label set of this name with other labels exists, or the directory cannot be written.
    """
    path = label_set_path(root, split, name)
    ids = pa.array(np.arange(len(labels), dtype=np.int64))
    metadata = {"nldist": json.dumps(dict(origin))} if origin else None
    table = pa.table({"id": ids, "label": pa.array(labels.astype(np.int32))}, metadata=metadata)
    if not path.exists():
        Path(root).mkdir(parents=True, exist_ok=True)
        with locked(Path(root) / ".dataset.lock"):  # two commands may choose one name
            if not path.exists():
                with writing(path) as aside:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pq.write_table(table, aside)
                return path
    if not _holds(path, table):
        raise UserError(f"{path} exists and holds other labels: choose another name")
    return path


def labels_from_csv(
    index: Index, file: str | Path, path_column: str, label_column: str, reading: Reading | None = None
) -> tuple[np.ndarray, int]:
    """Read labels for the samples of `index` from a table; what they mean `nldist.data.make.meaning` says.

    A row belongs to the sample whose key is that of the row's path (`nldist.data.make.keys`), without its first k
    directories. k is the same for all rows: the smallest that gives every sample a row.

    Returns:
        labels int32 (N,), and the number of rows that belong to no sample.

    Raises:
        UserError: the table cannot be read or has no such column, a label is not a class, a sample has no
            row, or two rows that disagree.
    """
    paths, texts = read_table(Path(file), path_column, label_column)
    keys, stems = _keys(paths)
    ids = _match(index, keys, file)
    known = ids >= 0
    given, _ = classes_of(texts, Path(file), tuple(index.classes), reading, of_rows=known)
    labels = np.empty(len(index), np.int32)
    labels[ids[known]] = given[known]
    clash = np.flatnonzero(known & (labels[ids] != given))
    if len(clash):
        raise UserError(f"{file}: two rows for {keys[clash[0]]!r} disagree on its label")
    if len(set(stems)) < len(set(keys)):
        left_out = tuple(entry.path for entry in rejected_of(index.root, index.split)) or ("\0",)
        was_sharded = [not os.fsdecode(path).endswith(left_out) for path in paths.to_pylist()]
        _check_twins(file, np.array(stems, object)[was_sharded], known[was_sharded], given[was_sharded])
    return labels, int(len(keys) - known.sum())


def transition_table(clean: np.ndarray, noisy: np.ndarray, classes: list[str]) -> str:
    """Text that shows what became of the samples of each clean class, in per cent of the class.

    A row for each clean class up to 20 classes; beyond, the most frequent confusions and the spread of the
    classes' noise rates.
    """
    num_classes = len(classes)
    pairs = clean.astype(np.int64) * num_classes + noisy
    if num_classes > _MAX_TABLE_CLASSES:
        return _summary(pairs, np.bincount(clean, minlength=num_classes), classes)
    counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    percent = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    width = max(5, *(len(name) for name in classes))
    lines = [" ".join(f"{name:>{width}}" for name in ["", *classes])]
    for name, row in zip(classes, percent, strict=True):
        lines.append(" ".join([f"{name:>{width}}", *(f"{value:{width}.1f}" for value in row)]))
    return "\n".join(lines)


def _summary(pairs: np.ndarray, totals: np.ndarray, classes: list[str]) -> str:
    """The most frequent pairs (clean * C + noisy) that differ, and the classes' noise rates."""
    num_classes = len(classes)
    codes, counts = np.unique(pairs, return_counts=True)
    wrong = codes // num_classes != codes % num_classes
    codes, counts = codes[wrong], counts[wrong]
    lines = ["most frequent confusions (clean -> noisy: samples, per cent of the clean class)"]
    for position in np.argsort(-counts, kind="stable")[:_NUM_CONFUSIONS]:
        source, mistaken = divmod(int(codes[position]), num_classes)
        share = 100 * counts[position] / totals[source]
        lines.append(f"  {classes[source]} -> {classes[mistaken]}: {counts[position]}, {share:.1f} %")
    changed = np.bincount(codes // num_classes, weights=counts, minlength=num_classes)
    rates = (100 * changed / np.maximum(totals, 1))[totals > 0]
    lines.append(
        f"noise rate of a class: min {rates.min():.1f} %, median {median(rates):.1f} %, max {rates.max():.1f} %"
    )
    return "\n".join(lines)


def _select(num_samples: int, rate: float, seed: int) -> np.ndarray:
    """The first int(rate * N) of one permutation of the ids per seed."""
    if not 0 <= rate <= 1:
        raise UserError(f"the noise rate must be in [0, 1], not {rate}")
    return np.random.default_rng([seed, 0]).permutation(num_samples)[: int(rate * num_samples)]


def _move(clean: np.ndarray, target: np.ndarray, rate: float, seed: int) -> np.ndarray:
    """Give the selected samples of class y the class target[y]."""
    selected = _select(len(clean), rate, seed)
    noisy = np.array(clean, np.int32)
    noisy[selected] = target[clean[selected]]
    return noisy


def _holds(path: Path, table: pa.Table) -> bool:
    try:
        return bool(pq.read_table(path).equals(table))
    except (OSError, pa.ArrowException):
        return False


def _keys(paths: pa.Array) -> tuple[list[str], list[str]]:
    """The rows' keys in the form in which they are matched, and the same without what tells apart images of one stem.

    Those that share a name but for the extension have the keys that sharding gave them, if the table has all of them.
    """
    written = [plain(os.fsdecode(path)) for path in paths.to_pylist()]
    names = sorted(os.fsencode(name) for name in set(written))
    keys = matched(keys_of(pa.array(names, pa.large_binary())).to_pylist())
    key_of = dict(zip(map(os.fsdecode, names), keys, strict=True))
    stem_of = {name: os.path.splitext(name)[0].replace(".", "_") for name in key_of}
    return [key_of[name] for name in written], [stem_of[name] for name in written]


def _check_twins(file: str | Path, stems: np.ndarray, known: np.ndarray, given: np.ndarray) -> None:
    """Of images of one stem all must be samples, or have one label; else some could be taken for others.

    For the data set does not have their extensions. The rows' stems, whether they are samples, and their labels: (N,).
    """
    for stem in sorted({*stems[known]} & {*stems[~known]}):
        if len(set(given[stems == stem])) > 1:
            raise UserError(
                f"{file}: two rows for {stem!r} disagree on its label; not all are about samples: leave out those "
                "that are not"
            )


def _match(index: Index, keys: list[str], file: str | Path) -> np.ndarray:
    """The id that each row's key names, -1 for none, after leaving out as many directories as it takes."""
    names = matched(index.keys(range(len(index))))
    id_of = {name: id_ for id_, name in enumerate(names)}
    if len(id_of) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{file}: two samples of the data set have the key {twice!r}, so no path can tell them apart")
    fewest_missing: list[str] = list(id_of)
    for num_left_out in range(max((key.count("/") for key in keys), default=0) + 1):
        stripped = (key.split("/", num_left_out) for key in keys)
        found = (id_of.get(parts[-1], -1) if len(parts) > num_left_out else -1 for parts in stripped)
        ids = np.fromiter(found, np.int64, len(keys))
        seen = np.zeros(len(index), bool)
        seen[ids[ids >= 0]] = True
        if seen.all():
            return ids
        missing = [key for key, there in zip(id_of, seen, strict=True) if not there]
        fewest_missing = min(fewest_missing, missing, key=len)
    raise UserError(
        f"{file} has no row for {len(fewest_missing)} of {len(index)} samples, such as "
        f"{_examples(fewest_missing)}; its paths are like {_examples(keys)}"
    )


def _examples(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name, _ in zip(names, range(_NUM_EXAMPLES), strict=False))
