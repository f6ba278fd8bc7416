"""The listing of a split in the order of its shards, on disk: who writes a shard reads the rows of that one alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from nldist.data.manifest import writing


class Facts(NamedTuple):
    """What belongs to a listing as a whole: the classes, notes for the user, and how many images each shard has."""

    classes: list[str]
    notes: list[str]
    sizes: list[int]


@dataclass(frozen=True)
class Listed:
    """The file: an Arrow table with the columns of a listing and key, a record batch for each shard."""

    file: Path

    def save(self, table: pa.Table, order: np.ndarray, shard_size: int, classes: list[str], notes: list[str]) -> None:
        """Write the rows of `table` (N) in this `order` (N,), `shard_size` in a shard."""
        starts = range(0, table.num_rows, shard_size)
        facts = Facts(classes, notes, [min(shard_size, table.num_rows - start) for start in starts])
        schema = table.schema.with_metadata({"facts": json.dumps(facts)})
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with writing(self.file) as aside, pa.ipc.new_file(str(aside), schema, options=options) as out:
            for start in starts:
                rows = table.take(order[start : start + shard_size]).replace_schema_metadata(schema.metadata)
                out.write_batch(rows.combine_chunks().to_batches()[0])

    def facts(self) -> Facts:
        """What belongs to all."""
        with pa.OSFile(str(self.file)) as file:
            return _facts(pa.ipc.open_file(file).schema)

    def rows(self, shard: int) -> Any:
        """The rows of one shard, in order, as an Arrow record batch."""
        with pa.OSFile(str(self.file)) as file:
            return pa.ipc.open_file(file).get_batch(shard)

    def read(self) -> tuple[pa.Table, Facts]:
        """All rows, and what belongs to all."""
        with pa.OSFile(str(self.file)) as file:
            table = pa.ipc.open_file(file).read_all()
        return table, _facts(table.schema)


def _facts(schema: pa.Schema) -> Facts:
    return Facts(*json.loads(schema.metadata[b"facts"]))
