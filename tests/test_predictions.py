"""Tables of predictions that are larger than what is kept in memory."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nldist.train.predictions import Rows, Step, append, open_sink, schema_of

NUM_CLASSES, NUM_ROWS = 100_000, 230  # 400 kB a row


def test_rows_are_written_in_pieces_and_parts_are_put_together(tmp_path: Path) -> None:
    classes, random = [f"class {number}" for number in range(NUM_CLASSES)], np.random.default_rng(0)
    schema = schema_of(classes, 2, True, {"run": "a"})
    values, bad = random.random((2 * NUM_ROWS, NUM_CLASSES), np.float32), {5, 300}
    for part in range(2):
        with contextlib.closing(open_sink(tmp_path / f"{part}.parquet", schema)) as sink:
            rows = Rows(sink, schema, classes, lambda ids: [f"{id_}.jpg" for id_ in ids.tolist()])
            for start in range(part * NUM_ROWS, (part + 1) * NUM_ROWS, 46):
                ids = np.arange(start, start + 46)
                seen = np.array([id_ not in bad for id_ in ids.tolist()])
                order = np.argsort(-values[ids[seen]], axis=1)[:, :2]
                best = np.take_along_axis(values[ids[seen]], order, 1)
                rows.add(Step(ids, seen, order, best, values[ids[seen]], ["broken"] * int((~seen).sum())))
            rows.flush()
    with contextlib.closing(open_sink(tmp_path / "all.parquet", schema)) as sink:
        append(sink, tmp_path / "0.parquet")
        append(sink, tmp_path / "1.parquet")
    assert pq.ParquetFile(tmp_path / "0.parquet").num_row_groups == 2
    with pq.ParquetFile(tmp_path / "all.parquet") as file:
        assert file.num_row_groups == 4
        table = file.read()
    assert table["path"].to_pylist() == [f"{id_}.jpg" for id_ in range(2 * NUM_ROWS)]
    found = table["probabilities"].combine_chunks().flatten().to_numpy().reshape(-1, NUM_CLASSES)
    kept = [id_ for id_ in range(2 * NUM_ROWS) if id_ not in bad]
    np.testing.assert_array_equal(found[kept], values[kept])
    assert np.isnan(found[[*bad]]).all()
    assert [id_ for id_, error in enumerate(table["error"].to_pylist()) if error == "broken"] == sorted(bad)
    labels = table["label_id"].to_pylist()
    assert [labels[id_] for id_ in kept] == values[kept].argmax(1).tolist()
    assert all(labels[id_] is None for id_ in bad)
    assert schema.metadata[b"run"] == b"a"
    assert table["label"].to_pylist()[0] == f"class {labels[0]}"
