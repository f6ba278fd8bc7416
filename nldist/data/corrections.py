"""Labels put right: what a run suggests, and what a person has marked, as a label set; label sets as tables."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from nldist.data.index import Index
from nldist.data.make.keys import matched
from nldist.data.make.meaning import Reading, meaning
from nldist.data.make.sources.csv import DELIMITERS
from nldist.errors import UserError
from nldist.files import replacing

SAMPLES_FILE = Path("tables", "samples.parquet")  # in a run directory
MARKS = ("wrong", "right", "unsure")


@dataclass(frozen=True)
class Suggestions:
    """What a run says of its training samples.

    Attributes:
        given: int32 (N,), the labels that it was trained on.
        clean_probability: float32 (N,), that they are right; NaN where it does not know.
        suggested: int32 (N,), the class that it holds for right; -1 where it does not know.
    """

    given: np.ndarray
    clean_probability: np.ndarray
    suggested: np.ndarray

    @classmethod
    def read(cls, run_dir: Path, index: Index) -> "Suggestions":
        """Of a run on the samples of `index`.

        Raises:
            UserError: the run has left none, or its samples are others.
        """
        file = run_dir / SAMPLES_FILE
        try:
            table = pq.read_table(file).sort_by("id")
        except (OSError, pa.ArrowException) as error:
            missing = isinstance(error, FileNotFoundError)
            raise UserError(
                f"{file} {'is missing: the run has not ended' if missing else f'is damaged: {error}'}"
            ) from None
        if not table["key"].equals(pq.read_table(index.root / index.split / "index.parquet", columns=["key"])["key"]):
            raise UserError(f"{run_dir} was trained on other samples than {index.root / index.split} has")
        return cls(
            table["label"].to_numpy().astype(np.int32),
            table["clean_probability"].fill_null(np.nan).to_numpy(),
            table["suggested"].fill_null(-1).to_numpy().astype(np.int32),
        )

    def corrected(self, below: float, at_most_rate: float | None) -> np.ndarray:
        """The given labels, with those the suggested ones that are probably wrong: int32 (N,).

        Args:
            below: a label is replaced whose probability to be right is less, if another class is suggested.
            at_most_rate: share of all samples whose labels are replaced at most, the least probable ones first; None:
                no limit.
        """
        doubtful = (self.clean_probability < below) & (self.suggested >= 0) & (self.suggested != self.given)
        ids = np.flatnonzero(doubtful)
        if at_most_rate is not None:
            order = np.argsort(self.clean_probability[ids], kind="stable")
            ids = ids[order[: int(at_most_rate * len(self.given))]]
        labels: np.ndarray = self.given.copy()
        labels[ids] = self.suggested[ids]
        return labels


def apply_marks(index: Index, labels: np.ndarray, file: Path, reading: Reading | None = None) -> dict[str, int]:
    """Put in `labels` (N,) what a person has decided about single samples; how many marks of each kind there were.

    The table has the columns key, given, suggested (classes) and mark, and a row per sample: of a `right` one the label
    is the given class, of a `wrong` one the suggested class, of an `unsure` one what it was. Rows without a mark say
    nothing.

    Raises:
        UserError: the table cannot be read, or a row's key, mark or class does not exist, or is there twice.
    """
    rows = [row for row in _rows(file) if row["mark"]]
    if unknown := sorted({row["mark"] for row in rows} - {*MARKS}):
        raise UserError(f"{file}: mark {unknown[0]!r} is none of {', '.join(MARKS)}")
    keys = [row["key"] for row in rows]
    if len(set(keys)) < len(keys):
        raise UserError(f"{file}: {next(key for key in keys if keys.count(key) > 1)!r} has two marks")
    ids = _ids(index, keys, file)
    for mark, column in (("right", "given"), ("wrong", "suggested")):
        chosen = [(row, id_) for row, id_ in zip(rows, ids, strict=True) if row["mark"] == mark]
        found = meaning(str(file), [row[column] for row, _ in chosen], index.classes, reading)
        for row, id_ in chosen:
            if row[column] not in found.class_of:
                raise UserError(f"{file}: {row['key']!r}: {column} {found.faults[row[column]]}")
            labels[id_] = found.class_of[row[column]]
    return {mark: sum(row["mark"] == mark for row in rows) for mark in MARKS}


def _rows(file: Path) -> list[dict[str, str]]:
    """The rows of a table of marks, stripped of blanks."""
    wanted = ("key", "given", "suggested", "mark")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines(keepends=True)
        delimiter = max(DELIMITERS, key=lambda each: lines[0].count(each)) if lines else ","
        rows = list(csv.DictReader(lines, delimiter=delimiter, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table: {error}") from None
    if not rows or any(name not in rows[0] for name in wanted):
        raise UserError(f"{file} must have a header with {', '.join(wanted)}, and rows")
    if any(row[name] is None for row in rows for name in wanted):
        raise UserError(f"{file} has a row that is too short")
    # A key may begin or end with a blank.
    return [{name: row[name] if name == "key" else row[name].strip() for name in wanted} for row in rows]


def _ids(index: Index, keys: list[str], file: Path) -> list[int]:
    id_of = {key: id_ for id_, key in enumerate(matched(index.keys(range(len(index)))))}
    found = [id_of.get(key, -1) for key in matched(keys)]
    if -1 in found:
        raise UserError(f"{file}: the data set has no sample {keys[found.index(-1)]!r}")
    return found


def export(index: Index, labels: np.ndarray, file: Path) -> None:
    """Write a table of every sample's path (its key) and class name."""
    keys = pq.read_table(index.root / index.split / "index.parquet", columns=["key"])["key"]
    table = pa.table({"path": keys, "label": pa.array(index.classes).take(pa.array(labels))})
    with replacing(file) as aside:
        pa.csv.write_csv(table, aside)
