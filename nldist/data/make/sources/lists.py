"""What sources of published data sets share: lists of images in text files, and what to say where parts are missing."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from nldist.data.make.meaning import shown
from nldist.errors import UserError

NO_LABEL = -1
ARCHIVES = (".tar", ".zip", ".tar.gz", ".tgz")

_FEW = 0.01  # share of the labels whose lack is an oversight of the publishers, and not a damaged file


def read_list(file: Path) -> tuple[pa.Array, np.ndarray]:
    """The paths (large_binary, (N,)) and labels (int32 (N,)) of a text file with one image per line.

    The label is the number behind the path, `NO_LABEL` where there is none. Paths may hold commas and blanks; lines may
    end as Windows ends them; empty ones are passed over.

    Raises:
        UserError: the file cannot be read, or names no image.
    """
    parts = []
    try:
        with pa.csv.open_csv(
            file,
            read_options=pa.csv.ReadOptions(column_names=["line"]),
            parse_options=pa.csv.ParseOptions(delimiter="\x01", quote_char=False),  # a line is one column
            convert_options=pa.csv.ConvertOptions(column_types={"line": pa.large_string()}),
        ) as batches:
            parts += [_parts(pc.utf8_trim_whitespace(batch["line"])) for batch in batches]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    if not any(len(path) for path, _ in parts):
        raise UserError(f"{file} names no image")
    return pa.concat_arrays([path for path, _ in parts]), np.concatenate([label for _, label in parts])


def _parts(lines: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The paths and labels of lines without blanks around them."""
    lines = lines.filter(pc.not_equal(lines, ""))
    words = pc.utf8_split_whitespace(lines, max_splits=1, reverse=True)
    ends = words.offsets.to_numpy()
    last = words.values.take(pa.array(ends[1:] - 1))
    has_label = pc.and_(pa.array(np.diff(ends) == 2), pc.match_substring_regex(last, "^[0-9]{1,9}$"))
    before = pc.utf8_rtrim_whitespace(words.values.take(pa.array(ends[:-1])))
    labels = pc.if_else(has_label, last, str(NO_LABEL)).cast(pa.int32()).to_numpy()
    return pc.if_else(has_label, before, lines).cast(pa.large_binary()), labels


def labels_of(keys: pa.Array, paths: pa.Array, labels: np.ndarray) -> np.ndarray:
    """The labels (int32 (M,)) that `paths` with `labels` (N,) give `keys` (M,), `NO_LABEL` where they give none."""
    rows = pc.index_in(keys, value_set=paths).fill_null(-1).to_numpy()
    return np.where(rows < 0, NO_LABEL, labels[rows]).astype(np.int32)


def once(paths: pa.Array, labels: np.ndarray, place: str) -> tuple[pa.Array, np.ndarray, list[str]]:
    """Paths and labels without those that are listed again, and a note about these; a path's first label counts."""
    order = pc.sort_indices(paths)  # stable: the first of equal ones is the first listed
    ordered = paths.take(order)
    is_again = np.zeros(len(paths), bool)
    is_again[1:] = pc.equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
    if not is_again.any():
        return paths, labels, []
    order = order.to_numpy()
    first = np.maximum.accumulate(np.where(is_again, 0, np.arange(len(paths))))
    num_apart = np.count_nonzero(labels[order] != labels[order[first]])
    again, rows = np.sort(order[is_again]), np.sort(order[~is_again])
    note = f"{len(again):,} images are listed again in {place} and count once: {_some(paths.take(again))}"
    if num_apart:
        note += f"; {num_apart:,} of them with another label, of which the first counts"
    return paths.take(rows), labels[rows], [note]


def labelled(paths: pa.Array, labels: np.ndarray, place: str) -> tuple[np.ndarray, list[str]]:
    """The rows (bool (N,)) that have a label, and a note about the others.

    Raises:
        UserError: more than a few have none, so the file is not whole.
    """
    lacking = labels == NO_LABEL
    num_lacking = int(np.count_nonzero(lacking))
    if not num_lacking:
        return ~lacking, []
    what = f"{num_lacking:,} of {len(labels):,} images have no label in {place}: {_some(paths.filter(lacking))}"
    if num_lacking > max(10, _FEW * len(labels)):
        raise UserError(f"{what}; is that file whole?")
    return ~lacking, [f"{what}; left out"]


def check_folders(root: Path, paths: pa.Array, place: Callable[[bytes], Path], is_partial: bool) -> None:
    """Raise UserError if directories of `paths` do not exist, unless a part of the data set `is_partial` on purpose.

    `place` says where a listed path lies. Single files that are missing are bad images, found when they are read.
    """
    folders = pc.unique(pc.replace_substring_regex(paths, "[^/]*$", "")).to_pylist()
    missing = [os.fsdecode(folder) for folder in folders if not place(folder).is_dir()]
    if missing and not is_partial:
        raise UserError(
            f"{root} lacks {len(missing):,} of the {len(folders):,} directories that its lists name, such as "
            f"{shown(sorted(missing))}{_unpack(root)}; to leave their images out, give --on-bad skip"
        )


def lacks(root: Path, missing: Sequence[str], layout: Sequence[str]) -> UserError:
    """What to say of a directory that is not laid out as it should be."""
    if not root.is_dir():
        return UserError(f"{root} is not a directory; it should hold {'; '.join(layout)}")
    return UserError(f"{root} lacks {', '.join(missing)}{_unpack(root)}; it should hold {'; '.join(layout)}")


def first_folder(candidates: Sequence[Path]) -> Path | None:
    """The first of several places that is a directory."""
    return next((folder for folder in candidates if folder.is_dir()), None)


def _unpack(root: Path) -> str:
    folders = [folder for folder in (root, root / "images", root / "train") if folder.is_dir()]
    names = [path for folder in folders for path in folder.iterdir() if path.name.lower().endswith(ARCHIVES)]
    archives = sorted(str(path.relative_to(root)) for path in names)
    return f" (there are archives to unpack: {shown(archives)})" if archives else ""


def _some(paths: pa.Array) -> str:
    return shown([path.decode("utf-8", "backslashreplace") for path in paths[:6].to_pylist()])
