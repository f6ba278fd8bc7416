"""tables/samples.parquet: what a run says of every label."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nldist.files import replacing


def write_samples(
    path: Path,
    index: Path,
    classes: Sequence[str],
    labels: np.ndarray,
    clean_probability: np.ndarray,
    suggested: np.ndarray,
) -> None:
    """Write id, key, label, clean probability and suggested label of every training sample.

    Args:
        path: the file.
        index: the split's index.parquet, which has the keys.
        classes: names of the classes, kept in the file's metadata (`classes`, JSON).
        labels: int (N,), the given labels.
        clean_probability: (N,), NaN where it is not known: null in the file.
        suggested: int (N,), -1 where it is not known: null in the file.
    """
    table = pq.read_table(index, columns=["id", "key"])
    table = table.append_column("label", pa.array(labels))
    table = table.append_column("clean_probability", pa.array(clean_probability, mask=np.isnan(clean_probability)))
    table = table.append_column("suggested", pa.array(suggested, mask=suggested < 0))
    table = table.replace_schema_metadata({"classes": json.dumps(list(classes))})
    with replacing(path) as aside:
        pq.write_table(table, aside)
