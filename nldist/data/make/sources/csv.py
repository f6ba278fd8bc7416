"""Images named in a table with a path and a label per row, as in Clothing1M's and WebVision's lists."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from nldist.data.make.sources.base import Listing, read_file
from nldist.errors import UserError


@dataclass(frozen=True)
class CsvSource:
    """`file` is a CSV table with a header; its paths are relative to `root`.

    Labels are class indices if all of them are integers, else class names. `classes` names the classes and
    fixes their order; without it they are the sorted names, or "0" up to the largest index.
    """

    kind: ClassVar[str] = "csv"
    file: Path
    root: Path
    path_column: str = "path"
    label_column: str = "label"
    classes: tuple[str, ...] | None = None

    def listing(self) -> Listing:
        """Read the table."""
        table = self._table()
        names = table[self.label_column]
        if pc.all(pc.match_substring_regex(names, r"^\d{1,9}$")).as_py():
            labels = names.cast(pa.int32()).to_numpy()
            classes = list(self.classes or map(str, range(int(labels.max()) + 1)))
        else:
            classes = list(self.classes or sorted(pc.unique(names).to_pylist()))
            labels = self._indices(names, classes)
        if labels.max() >= len(classes):
            raise UserError(f"{self.file} has label {labels.max()}, but there are only {len(classes)} classes")
        return Listing.of(table[self.path_column].cast(pa.large_binary()).combine_chunks(), labels, classes)

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes."""
        return read_file(self.root / os.fsdecode(path), max_bytes)

    def _table(self) -> pa.Table:
        columns = [self.path_column, self.label_column]
        options = pa.csv.ConvertOptions(
            include_columns=columns,
            column_types={name: pa.large_string() for name in columns},
            strings_can_be_null=False,
        )
        try:
            table = pa.csv.read_csv(self.file, convert_options=options)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read columns {', '.join(columns)} of {self.file}: {error}") from None
        if table.num_rows == 0:
            raise UserError(f"{self.file} has no rows")
        for name in columns:
            first = pc.index(table[name], pa.scalar("", pa.large_string())).as_py()
            if first >= 0:
                raise UserError(f"{self.file}: row {first + 1} below the header has an empty {name}")
        return table

    def _indices(self, names: pa.ChunkedArray, classes: list[str]) -> np.ndarray:
        found = pc.index_in(names, value_set=pa.array(classes, pa.large_string()))
        if found.null_count:
            unknown = pc.unique(names.filter(pc.is_null(found))).to_pylist()
            raise UserError(f"{self.file} has labels that are not among its {len(classes)} classes: {unknown[:5]}")
        return np.asarray(found.to_numpy())
