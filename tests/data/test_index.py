import errno
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nldist.data import index as index_module
from nldist.data.index import RECORD, Index, owned
from nldist.errors import UserError
from tests.data.make import label_of, make_dataset, write_facts, write_index, write_labels

SHARD_SIZES = [5, 1, 40, 0, 17]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", SHARD_SIZES)


def test_columns_point_at_the_images_in_the_tars(root: Path) -> None:
    index = Index.open(root, "train")
    names = []
    for id_ in range(len(index)):
        with open(index.shards[index.shard[id_]], "rb") as tar:
            tar.seek(index.offset[id_])
            assert zlib.crc32(tar.read(index.size[id_])) == index.crc32[id_]
    for path in index.shards:
        with tarfile.open(path) as tar:
            names += [name[:-4] for name in tar.getnames() if name.endswith(".png")]
    assert index.keys(range(len(index))) == names
    assert index.keys([40, 3, 62, 3]) == [names[i] for i in (40, 3, 62, 3)]
    assert np.array_equal(index.label, label_of(np.arange(63)))
    assert (index.height == 6).all()
    assert (index.width == 8).all()
    assert np.bincount(index.shard, minlength=5).tolist() == SHARD_SIZES
    assert (index.name, index.num_classes, index.classes[6]) == ("made", 7, "class 6")


def test_columns_are_mapped_and_read_only(root: Path) -> None:
    index = Index.open(root, "train")
    assert isinstance(index.records.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        index.label[0] = 1


def test_second_open_reuses_the_mapped_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Index.open(root, "train")
    monkeypatch.setattr(index_module, "_write_records", None)
    assert len(Index.open(root, "train")) == 63


def test_a_data_set_written_again_is_read_anew(root: Path) -> None:
    old = Index.open(root, "train")
    sent = pickle.dumps(old)
    columns = {name: old.records[name] for name in RECORD.names or ()}
    changed = np.zeros(63, np.int32)
    write_index(root / "train" / "index.parquet", columns | {"key": old.keys(range(63))}, changed)
    os.utime(root / "train" / "index.parquet", (0, 0))
    assert not Index.open(root, "train").label.any()
    with pytest.raises(UserError, match="written again while it was in use"):
        pickle.loads(sent)
    assert len(list((root / "train").glob(".index*"))) == 1


def test_read_only_data_set_uses_the_cache_directory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_temporary = tempfile.TemporaryFile

    def refuse_in_root(dir: Path) -> Any:
        if root in dir.parents:
            raise OSError(errno.EROFS, "Read-only file system")
        return make_temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse_in_root)
    with pytest.raises(UserError, match=r"read-only: set data\.cache_dir"):
        Index.open(root, "train")
    index = Index.open(root, "train", tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not list((root / "train").glob(".index*"))
    assert np.array_equal(pickle.loads(pickle.dumps(index)).records, index.records)


def _open_at_once(root: Path, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    assert np.array_equal(Index.open(root, "train").label, label_of(np.arange(63)))


def test_processes_that_open_it_at_once_do_not_disturb_each_other(root: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=_open_at_once, args=(root, start)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list((root / "train").glob("*.part"))) == 0
    assert len(list((root / "train").glob(".index-*.npy"))) == 1


def test_label_sets(root: Path) -> None:
    index = Index.open(root, "train")
    assert index.label_sets() == []
    other = label_of(np.arange(63) + 5)
    write_labels(root, "other", other)
    assert index.label_sets() == ["other"]
    assert np.array_equal(index.labels("other"), other)
    assert index.labels("other").dtype == index.labels().dtype == np.int32
    assert np.array_equal(index.labels(), label_of(np.arange(63)))
    with pytest.raises(UserError, match=r"no label set 'clean'; there are: other"):
        index.labels("clean")


def test_label_sets_that_are_not_complete_are_refused(root: Path) -> None:
    index = Index.open(root, "train")
    write_labels(root, "short", np.zeros(62, np.int32))
    write_labels(root, "unordered", np.zeros(63, np.int32), ids=np.arange(63)[::-1].astype(np.int64))
    write_labels(root, "outside", np.full(63, 7, np.int32))
    for name in ("short", "unordered"):
        with pytest.raises(UserError, match="every id from 0 to 62"):
            index.labels(name)
    with pytest.raises(UserError, match=r"label must be in 0\.\.6, found 7\.\.7"):
        index.labels("outside")


def test_what_is_missing_or_wrong_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: No such file"):
        Index.open(tmp_path / "nothing", "train")
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        Index.open(root, "test")
    facts = json.loads((root / "dataset.json").read_text())
    for change, message in (
        ({"format_version": 2}, "format version 2"),
        ({"splits": {"train": {}}}, "incomplete"),
    ):
        (root / "dataset.json").write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match=message):
            Index.open(root, "train")
    facts["splits"]["train"]["num_samples"] = 64
    (root / "dataset.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"63 rows, dataset\.json says 64"):
        Index.open(root, "train")
    (root / "train" / "index.parquet").unlink()
    with pytest.raises(UserError, match=r"index\.parquet: No such file"):
        Index.open(root, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": pa.array(range(1, 64), pa.int64())}, "ids must be 0 to 62 in order"),
        ({"shard": pa.array([5] * 63, pa.int32())}, r"shard must be in 0\.\.4"),
        ({"label": pa.array([-1] * 63, pa.int32())}, r"label must be in 0\.\.6"),
        ({"offset": None}, "cannot be read as an index"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(root: Path, change: dict, message: str) -> None:
    path = root / "train" / "index.parquet"
    table = pq.read_table(path)
    for name, column in change.items():
        place = table.column_names.index(name)
        table = table.remove_column(place) if column is None else table.set_column(place, name, column)
    pq.write_table(table, path)
    with pytest.raises(UserError, match=message):
        Index.open(root, "train")
    assert not list((root / "train").glob(".index*"))


def test_shards_elsewhere(root: Path) -> None:
    facts = json.loads((root / "dataset.json").read_text())
    shards = facts["splits"]["train"]["shards"]
    shards[0]["path"], shards[1]["path"] = "/far/away.tar", "https://host/away.tar"
    (root / "dataset.json").write_text(json.dumps(facts))
    index = Index.open(root, "train")
    assert index.shards[:3] == ["/far/away.tar", "https://host/away.tar", f"{root}/train/train-000002.tar"]


@pytest.mark.parametrize("n", [0, 1, 3, 10, 1_000_003])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_owned_is_a_partition_exact_to_one_sample(n: int, size: int) -> None:
    parts = [owned(n, rank, size) for rank in range(size)]
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == n
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


MEASURE = """
    import pickle, sys
    import numpy as np
    from nldist.data.index import Index

    def anonymous_mb():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

    root, sent = sys.argv[1], sys.stdin.buffer.read()
    before = anonymous_mb()
    index = pickle.loads(sent) if sent else Index.open(root, "train")
    index.records[np.random.default_rng(0).integers(len(index), size=100_000)]
    print(len(index), anonymous_mb() - before)
"""


def _measure(root: Path, sent: bytes) -> tuple[int, float]:
    """Number of samples, and the MB that a fresh process needs to open the index or to unpickle it."""
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(root)]
    length, megabytes = subprocess.run(command, input=sent, stdout=subprocess.PIPE, check=True).stdout.split()
    return int(length), float(megabytes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_process_at_2_4_million_images(tmp_path: Path) -> None:
    n = 2_400_000
    ids = np.arange(n)
    columns = {"shard": ids // 10_000, "offset": ids % 10_000 * 30_000 + 512, "size": ids % 30_000 + 1}
    columns |= {"crc32": ids, "height": ids % 256 + 1, "width": ids % 256 + 1}
    (tmp_path / "train").mkdir()
    keys = pa.array(ids).cast(pa.string())
    write_index(tmp_path / "train" / "index.parquet", columns | {"key": keys}, label_of(ids))
    shards = [{"path": f"train/{s}.tar", "num_samples": 10_000} for s in range(240)]
    write_facts(tmp_path, "train", shards, num_classes=7)
    first = _measure(tmp_path, b"")  # this one writes the mapped file
    assert list((tmp_path / "train").glob(".index-*.npy"))
    index = Index.open(tmp_path, "train")
    assert index.keys([2_399_999, 7]) == ["2399999", "7"]
    sent = pickle.dumps(index)
    assert len(sent) < 1_000
    worker = _measure(tmp_path, sent)
    assert first[0] == worker[0] == n
    assert first[1] < 100
    assert worker[1] < 20
