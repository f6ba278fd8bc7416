"""What a run leaves of its samples, in a file."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import nldist.data.samples as samples_module
from nldist.data.index import Index
from nldist.data.samples import SAMPLES_FILE, Samples


@pytest.mark.parametrize("num_rows", [7, 100, 10_000])
def test_they_are_written_some_at_a_time_and_read_as_they_were(
    num_rows: int, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples_module, "_ROWS_PER_WRITE", num_rows)
    index, random = Index.open(digits, "train"), np.random.default_rng(0)
    probability, margin = random.random((2, len(index))).astype(np.float32)
    suggested = random.integers(-1, 10, len(index)).astype(np.int16)
    probability[:200], margin[::7] = np.nan, np.nan
    written = Samples(index.labels("sym50"), probability, suggested, margin, "sym50", 2, 3)
    (tmp_path / "tables").mkdir()
    written.write(tmp_path, index)
    found = Samples.read(tmp_path, index)
    for name in ("given", "clean_probability", "suggested", "margin"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name))
    assert (found.label_set, found.num_epochs, found.of_epochs) == ("sym50", 2, 3)
    table = pq.read_table(tmp_path / SAMPLES_FILE)
    assert table["id"].to_pylist() == list(range(len(index)))
    assert table["key"].to_pylist() == index.keys(np.arange(len(index)))
    assert table["clean_probability"].null_count == 200
