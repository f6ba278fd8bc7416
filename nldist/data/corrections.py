"""Labels put right: what a run suggests, and what a person has marked, as a label set; label sets as tables."""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from nldist.data.index import Index
from nldist.data.make.keys import matched
from nldist.data.make.meaning import Reading, meaning
from nldist.data.make.sources.csv import DELIMITERS
from nldist.data.samples import Samples
from nldist.errors import UserError
from nldist.files import replacing

MARKS = ("wrong", "right", "unsure")
_NO_CLASS = "wrong without another class"


def corrected(samples: Samples, below: float, at_most_rate: float | None) -> np.ndarray:
    """The given labels, with those that are probably wrong replaced by what is suggested: int32 (N,).

    Args:
        samples: what a run says.
        below: a label is replaced whose probability to be right is less, if another class is suggested.
        at_most_rate: share of all samples whose labels are replaced at most, the most doubtful ones first
            (`Samples.order`); None: no limit.
    """
    ids = samples.order()
    other = samples.suggested[ids] != samples.given[ids]
    ids = ids[(samples.clean_probability[ids] < below) & (samples.suggested[ids] >= 0) & other]
    if at_most_rate is not None:
        ids = ids[: int(at_most_rate * len(samples.given))]
    labels: np.ndarray = samples.given.copy()
    labels[ids] = samples.suggested[ids]
    return labels


def apply_marks(index: Index, labels: np.ndarray, file: Path, reading: Reading | None = None) -> dict[str, int]:
    """Put in `labels` (N,) what a person has decided about single samples; how many marks of each kind there were.

    The table has the columns key, given, suggested (classes) and mark, and a row per sample: of a `right` one the label
    is the given class, of a `wrong` one the suggested class, of an `unsure` one what it was. Rows without a mark say
    nothing. A `wrong` one without another class leaves the label, too; it counts as "wrong without another class".

    Raises:
        UserError: the table cannot be read, or a row's key, mark or class does not exist, or is there twice.
    """
    rows = list(_marked(file))
    ids = _ids(index, [row["key"] for row in rows], file)
    found = meaning(str(file), [row[name] for row in rows for name in ("given", "suggested")], index.classes, reading)
    for row, id_ in zip(rows, ids, strict=True):
        if (column := {"right": "given", "wrong": "suggested"}.get(row["mark"])) is None:
            continue
        if row["mark"] == "wrong" and row["suggested"] in ("", row["given"]):
            row["mark"] = _NO_CLASS
            continue
        if row[column] not in found.class_of:
            raise UserError(f"{file}: {row['key']!r}: {column} {found.faults[row[column]]}")
        labels[id_] = found.class_of[row[column]]
    return {mark: sum(row["mark"] == mark for row in rows) for mark in (*MARKS, _NO_CLASS)}


def _marked(file: Path) -> Iterator[dict[str, str]]:
    """The rows of a table of marks that have one."""
    wanted = ("key", "given", "suggested", "mark")
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            header = text.readline()
            text.seek(0)
            delimiter = max(DELIMITERS, key=header.count)
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            if any(name not in (rows.fieldnames or ()) for name in wanted):
                raise UserError(f"{file} must have a header with {', '.join(wanted)}")
            for row in rows:
                if None in row or None in row.values():
                    raise UserError(f"{file}: line {rows.line_num} has more or fewer cells than the header")
                # A key may begin or end with a blank.
                marked = {name: row[name] if name == "key" else row[name].strip() for name in wanted}
                if marked["mark"] and marked["mark"] not in MARKS:
                    raise UserError(f"{file}: mark {marked['mark']!r} is none of {', '.join(MARKS)}")
                if marked["mark"]:
                    yield marked
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table: {error}") from None


def _ids(index: Index, keys: list[str], file: Path) -> list[int]:
    """The sample of each key, all different."""
    names = matched(index.keys(range(len(index))))
    id_of, wanted = {name: id_ for id_, name in enumerate(names)}, matched(keys)
    several = {name for name, count in Counter(names).items() if count > 1} if len(id_of) < len(names) else set()
    for key, name in zip(keys, wanted, strict=True):
        if name not in id_of:
            raise UserError(f"{file}: the data set has no sample {key!r}")
        if name in several:
            raise UserError(f"{file}: two samples of the data set have the key {name!r}; no mark can tell them apart")
    if len(set(wanted)) < len(wanted):
        raise UserError(f"{file}: {Counter(wanted).most_common(1)[0][0]!r} has two marks")
    return [id_of[name] for name in wanted]


def export(index: Index, labels: np.ndarray, file: Path) -> None:
    """Write a table of every sample's path (its key) and class name.

    Raises:
        UserError: the file exists and holds something else.
        OSError: it cannot be written.
    """
    table = pa.table({"path": index.key_column(), "label": pa.array(index.classes).take(pa.array(labels))})
    out = pa.BufferOutputStream()
    pa.csv.write_csv(table, out)
    text = out.getvalue().to_pybytes()
    if file.exists() and file.read_bytes() != text:
        raise UserError(f"{file} exists and holds something else: choose another name")
    with replacing(file) as aside:
        aside.write_bytes(text)
