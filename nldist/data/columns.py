"""Columns of Parquet files without pandas, seconds in each process: pyarrow's `read_table` and `to_numpy` import it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nldist.errors import UserError


def read_columns(path: Path, columns: list[str]) -> pa.Table:
    """These columns of a Parquet file. Raises UserError where it cannot be read or lacks one."""
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=columns).select(columns)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A column as an array. `to_numpy` is for columns with nulls or texts alone."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    is_plain = pa.types.is_integer(column.type) and not column.null_count
    found: np.ndarray = np.from_dlpack(whole) if is_plain else column.to_numpy()
    return found
