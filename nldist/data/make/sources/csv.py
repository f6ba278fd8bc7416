"""Images named in a table with a path and a label per row, as in Clothing1M's and WebVision's lists."""

import csv
import io
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from nldist.data.make.meaning import Reading, meaning
from nldist.data.make.sources.base import UTF_16, Listing, read_file
from nldist.errors import UserError

DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class CsvSource:
    """`file` is a table with a header; its paths are relative to `root`.

    `classes` names the classes and fixes their order; without it the table does (see `nldist.data.make.meaning`).
    """

    kind: ClassVar[str] = "csv"
    file: Path
    root: Path
    path_column: str = "path"
    label_column: str = "label"
    classes: tuple[str, ...] | None = None
    reading: Reading | None = None

    def listing(self) -> Listing:
        """Read the table."""
        paths, labels = read_table(self.file, self.path_column, self.label_column)
        indices, classes = classes_of(labels, self.file, self.classes, self.reading)
        return Listing.of(self._with_slashes(paths), indices, classes)

    def read(self, path: bytes, max_bytes: int) -> bytes:
        """The file's bytes; its name may have another Unicode normal form than the table's."""
        place = self.root / os.fsdecode(path)
        if path.isascii() or place.exists():
            return read_file(place, max_bytes)
        forms = (self.root / unicodedata.normalize(form, os.fsdecode(path)) for form in ("NFC", "NFD"))
        return read_file(next((form for form in forms if form.exists()), place), max_bytes)

    def _with_slashes(self, paths: pa.Array) -> pa.Array:
        """Paths that Windows wrote get slashes."""
        first = pc.index(pc.match_substring(paths, "\\"), True).as_py()
        if first < 0 or pc.any(pc.match_substring(paths, "/")).as_py():
            return paths
        if (self.root / os.fsdecode(paths[first].as_py())).exists():
            return paths
        return pc.replace_substring(paths.cast(pa.large_string()), "\\", "/").cast(pa.large_binary())


def read_table(file: Path, path_column: str, label_column: str) -> tuple[pa.Array, pa.Array]:
    """The paths (large_binary) and the labels (large_string) of a table's rows, none of them empty.

    The table has a header, is separated by commas, semicolons or tabs, and is in UTF-8 or, with a byte-order mark,
    in UTF-16. A column is found in another case, too, where only one is meant.

    Raises:
        UserError: the table cannot be read, has no rows, or has no such column.
    """
    wanted = [path_column, label_column]
    try:
        delimiter, columns = _columns(file, wanted)
        table = pa.csv.read_csv(
            _bytes(file),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(dict.fromkeys(columns)),
                column_types={name: pa.large_string() for name in columns},
                strings_can_be_null=False,
            ),
        )
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, UnicodeDecodeError) or "UTF8" in reason:
            reason += "; save it in UTF-8"
        raise UserError(f"cannot read columns {', '.join(wanted)} of {file}: {reason}") from None
    if table.num_rows == 0:
        raise UserError(f"{file} has no rows")
    for name, column in zip(wanted, columns, strict=True):
        first = pc.index(pc.utf8_trim_whitespace(table[column]), pa.scalar("", pa.large_string())).as_py()
        if first >= 0:
            raise UserError(f"{file}: row {first + 1} below the header has an empty {name}")
    paths, labels = (table[column].combine_chunks() for column in columns)
    return paths.cast(pa.large_binary()), labels


def classes_of(
    labels: pa.Array,
    place: Path,
    classes: tuple[str, ...] | None,
    reading: Reading | None,
    of_rows: np.ndarray | None = None,
) -> tuple[np.ndarray, list[str]]:
    """The classes (N,) that a table's labels mean, and the classes' names. Only those `of_rows` (bool (N,)) matter.

    Raises:
        UserError: a label has no meaning, with its row, or has two.
    """
    coded = labels.dictionary_encode()
    codes, texts = coded.indices.to_numpy(), np.array(coded.dictionary.to_pylist(), object)
    used = np.unique(codes if of_rows is None else codes[of_rows])
    found = meaning(str(place), texts[used], classes, reading)
    if found.faults:
        is_bad = np.isin(codes, [code for code in used if texts[code] in found.faults])
        row = int(np.flatnonzero(is_bad if of_rows is None else is_bad & of_rows)[0])
        more = f" ({len(found.faults) - 1} more labels mean nothing)" if len(found.faults) > 1 else ""
        raise UserError(f"{place}: row {row + 1} below the header: {found.faults[texts[codes[row]]]}{more}")
    class_of_code = np.array([found.class_of.get(text, -1) for text in texts], np.int32)
    return class_of_code[codes], found.classes


def _columns(file: Path, wanted: list[str]) -> tuple[str, list[str]]:
    """The delimiter, and the names by which the table has the wanted columns."""
    with io.TextIOWrapper(_bytes(file), encoding="utf-8-sig", newline="") as text:
        start = text.read(2**16)
    headers = {sign: _header(start, sign) for sign in DELIMITERS}
    for delimiter, header in headers.items():
        found = [_column(header, name) for name in wanted]
        if None not in found:
            return delimiter, [name for name in found if name is not None]
    header = max(headers.values(), key=len)
    if not header:
        raise ValueError("it is empty")
    missing = [name for name in wanted if _column(header, name) is None]
    raise ValueError(f"no column {', '.join(missing)} (or more than one) among {', '.join(map(repr, header))}")


def _header(start: str, delimiter: str) -> list[str]:
    """The first row that is not empty."""
    return next(filter(None, csv.reader(io.StringIO(start, newline=""), delimiter=delimiter)), [])


def _column(header: list[str], name: str) -> str | None:
    """The one column of this name, whatever its case if there is none of this very name."""
    exact = [column for column in header if column == name]
    alike = exact or [column for column in header if column.strip().casefold() == name.strip().casefold()]
    return alike[0] if len(alike) == 1 else None


def _bytes(file: Path) -> Any:
    """The table in UTF-8; one that is compressed is opened."""
    stream = pa.input_stream(str(file))
    start = stream.read(2)
    if start not in UTF_16:
        return pa.input_stream(str(file))
    return pa.BufferReader((start + stream.read()).decode("utf-16").encode())
