"""The table of predictions: a row per image, written as they come."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".csv")
_MAX_BYTES, _MAX_ROWS = 64 * 2**20, 65_536  # that wait to be written


class Sink(Protocol):
    """Where rows go."""

    def write_table(self, table: pa.Table) -> None:
        """Append some."""

    def close(self) -> None:
        """Complete the file."""


class Step(NamedTuple):
    """What became of some images.

    Attributes:
        ids: (b,) of the images.
        seen: bool (b,), which of them could be read: s.
        order: int (s, top), their most probable classes, best first.
        best: float32 (s, top), the probabilities of these.
        probabilities: float32 (s, C) of all classes, where the table has them; else None.
        errors: b - s, why the others could not be read.
    """

    ids: np.ndarray
    seen: np.ndarray
    order: np.ndarray
    best: np.ndarray
    probabilities: np.ndarray | None
    errors: list[str]


def schema_of(classes: list[str], top: int, probabilities: bool, facts: dict[str, str]) -> pa.Schema:
    """The columns of a table of predictions; its metadata are the classes (JSON) and `facts`.

    path; label, label_id and probability of the most probable class; label_2, probability_2 and so on of those after
    it; probabilities of all classes; error: why there are none (they are null then, those of all classes NaN).
    """
    fields = [("path", pa.string()), ("label", pa.string()), ("label_id", pa.int32()), ("probability", pa.float32())]
    for place in range(2, top + 1):
        fields += [(f"label_{place}", pa.string()), (f"probability_{place}", pa.float32())]
    if probabilities:
        fields.append(("probabilities", pa.list_(pa.float32(), len(classes))))
    return pa.schema([*fields, ("error", pa.string())], {"classes": json.dumps(classes), **facts})


def open_sink(target: Path | BinaryIO, schema: pa.Schema, suffix: str = ".parquet") -> Sink:
    """Begin a table in a file or stream: CSV or Parquet."""
    place = str(target) if isinstance(target, Path) else target
    if suffix == ".csv":
        sink: Sink = pa.csv.CSVWriter(place, schema)
    else:
        texts = [field.name for field in schema if pa.types.is_string(field.type)]
        sink = pq.ParquetWriter(place, schema, use_dictionary=texts)
    return sink


def append(sink: Sink, part: Path) -> None:
    """Append the rows of a Parquet file, a piece at a time."""
    with pq.ParquetFile(part) as file:
        for group in range(file.num_row_groups):
            sink.write_table(file.read_row_group(group))


class Rows:
    """Rows that are collected until there are enough to be written.

    Args:
        sink: where they go.
        schema: of the table.
        classes: names of the C classes.
        keys: gives images' names for their ids (b,).
    """

    def __init__(
        self, sink: Sink, schema: pa.Schema, classes: list[str], keys: Callable[[np.ndarray], list[str]]
    ) -> None:
        self._sink, self._schema, self._classes, self._keys = sink, schema, classes, keys
        row_bytes = 50 * len(schema) + (4 * len(classes) if "probabilities" in schema.names else 0)
        self._most = min(_MAX_ROWS, max(1, _MAX_BYTES // row_bytes))
        self._steps: list[Step] = []
        self._num_rows = 0

    def add(self, step: Step) -> None:
        """Add a row per image."""
        self._steps.append(step)
        self._num_rows += len(step.ids)
        if self._num_rows >= self._most:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        if self._steps:
            self._sink.write_table(self._table())
        self._steps, self._num_rows = [], 0

    def _table(self) -> pa.Table:
        columns = columns_of(self._steps, self._classes)
        columns["path"] = pa.array(self._keys(np.concatenate([step.ids for step in self._steps])))
        return pa.table([columns[name] for name in self._schema.names], self._schema)


def columns_of(steps: Sequence[Step], classes: Sequence[str]) -> dict[str, pa.Array]:
    """The columns of a table of predictions by name, but for the paths."""
    _, seen, order, best = (np.concatenate([step[part] for step in steps]) for part in range(4))
    errors = np.full(len(seen), None, object)
    errors[~seen] = [error for step in steps for error in step.errors]
    columns = {"label_id": _spread(order[:, 0].astype(np.int32), seen), "error": pa.array(errors, pa.string())}
    for place in range(order.shape[1]):
        more = f"_{place + 1}" if place else ""
        columns[f"label{more}"] = pa.array(classes).take(_spread(order[:, place], seen))
        columns[f"probability{more}"] = _spread(best[:, place], seen)
    rows = [step.probabilities for step in steps if step.probabilities is not None]
    if rows:
        columns["probabilities"] = _spread_lists(np.concatenate(rows), seen)
    return columns


def _spread(values: np.ndarray, seen: np.ndarray) -> pa.Array:
    """The values (s,) at the places (b,) that are `seen`, null elsewhere."""
    spread = np.zeros(len(seen), values.dtype)
    spread[seen] = values
    return pa.array(spread, mask=~seen)


def _spread_lists(values: np.ndarray, seen: np.ndarray) -> pa.Array:
    """The same of rows (s, C), but NaN elsewhere: Parquet's null lists of a fixed size cannot be read back."""
    spread = np.full((len(seen), values.shape[1]), np.nan, values.dtype)
    spread[seen] = values
    return pa.FixedSizeListArray.from_arrays(pa.array(spread.reshape(-1)), values.shape[1])
