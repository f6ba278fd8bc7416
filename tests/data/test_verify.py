"""verify finds each kind of damage, and says where it is."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from nldist.data.make.verify import verify
from nldist.errors import UserError
from tests.data.test_writer import shard

SHARD = Path("train/train-000001.tar")
INDEX = Path("train/index.parquet")


@pytest.fixture
def dataset(folder: Path, tmp_path: Path) -> Path:
    """21 samples in shards of 4, with the label set `clean`."""
    out = tmp_path / "out"
    shard(folder, out)
    write_label_set(out, np.arange(21), np.arange(21) % 3)
    return out


def write_label_set(root: Path, ids: np.ndarray, labels: np.ndarray, name: str = "clean") -> None:
    (root / "train/labels").mkdir(exist_ok=True)
    table = pa.table({"id": ids.astype(np.int64), "label": labels.astype(np.int32)})
    pq.write_table(table, root / "train/labels" / f"{name}.parquet")


def problems(root: Path) -> list[str]:
    return [str(problem) for problem in verify(root).problems]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x20
    path.write_bytes(content)


def row(root: Path, id_: int) -> dict[str, int]:
    return dict(pq.read_table(root / INDEX).slice(id_, 1).to_pylist()[0])


def edit_index(root: Path, column: str, id_: int, value: int) -> None:
    table = pq.read_table(root / INDEX)
    values = table[column].to_pylist()
    values[id_] = value
    position = table.column_names.index(column)
    pq.write_table(table.set_column(position, column, pa.array(values, table[column].type)), root / INDEX)


def edit_facts(root: Path, change: Callable[[dict], None]) -> None:
    facts = json.loads((root / "dataset.json").read_text())
    change(facts)
    (root / "dataset.json").write_text(json.dumps(facts))


def test_a_sound_data_set(dataset: Path) -> None:
    report = verify(dataset, num_workers=2)
    assert (report.num_samples, report.num_shards, report.problems) == (21, 6, [])


def test_truncated_tar(dataset: Path) -> None:
    content = (dataset / SHARD).read_bytes()
    (dataset / SHARD).write_bytes(content[: row(dataset, 6)["offset"] + 10])
    found = problems(dataset)
    assert any(f"dataset.json states {len(content):,}" in line for line in found)
    for id_ in (6, 7):
        assert any(f"{SHARD}: id {id_}:" in line for line in found), found
    assert not any("id 5:" in line or "id 8:" in line for line in found)


def test_flipped_byte_in_an_image(dataset: Path) -> None:
    at = row(dataset, 5)
    flip(dataset / SHARD, at["offset"] + at["size"] // 2)
    found = problems(dataset)
    assert f"train: {SHARD}: id 5: the image's bytes have changed (CRC-32)" in found
    assert any("SHA-256 differs" in line for line in found)
    assert not any("id 4:" in line or "id 6:" in line for line in found)


def test_flipped_byte_in_padding(dataset: Path) -> None:
    at = row(dataset, 5)
    flip(dataset / SHARD, at["offset"] + at["size"])
    assert problems(dataset) == [f"train: {SHARD}: SHA-256 differs from dataset.json: some byte has changed"]


def test_flipped_byte_in_a_header(dataset: Path) -> None:
    flip(dataset / SHARD, row(dataset, 5)["offset"] - 512)
    found = problems(dataset)
    assert any("no valid header at byte" in line for line in found)
    assert f"train: {SHARD}: id 5: no member begins at its offset" in found


def test_flipped_byte_in_a_label(dataset: Path) -> None:
    at = row(dataset, 5)
    content = (dataset / SHARD).read_bytes()
    flip(dataset / SHARD, content.index(b"%d\0\0" % at["label"], at["offset"] + at["size"] + 512))
    assert any(f"id 5: the index has label {at['label']}, the tar" in line for line in problems(dataset))


def test_missing_shard(dataset: Path) -> None:
    (dataset / SHARD).unlink()
    assert problems(dataset) == [f"train: {SHARD}: cannot be opened: No such file or directory"]


def test_missing_index(dataset: Path) -> None:
    (dataset / INDEX).unlink()
    assert problems(dataset) == [f"{INDEX}: is missing"]


@pytest.mark.parametrize("label", [3, -1])
def test_label_out_of_classes(dataset: Path, label: int) -> None:
    edit_index(dataset, "label", 6, label)
    found = problems(dataset)
    assert f"{INDEX}: id 6: label {label} is not among the 3 classes" in found
    assert any(f"{SHARD}: id 6: the index has label {label}" in line for line in found)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("id", 7, "ids are not 0, 1, 2"),
        ("shard", 3, "not ascending"),
        ("shard", 9, "out of range"),
        ("offset", 513, "id 6: no member begins"),
        ("size", 17, "id 6: the index has size 17"),
        ("crc32", 17, "id 6: the image's bytes"),
        ("height", 17, "id 6: the index has 17 x 8 pixels, the image 6 x 8"),
        ("key", "other", "id 6: the index has key other"),
    ],
)
def test_wrong_entry_in_the_index(dataset: Path, column: str, value: int, words: str) -> None:
    edit_index(dataset, column, 6, value)
    assert any(words in line for line in problems(dataset)), problems(dataset)


def test_index_and_dataset_disagree_on_the_count(dataset: Path) -> None:
    table = pq.read_table(dataset / INDEX)
    pq.write_table(table.filter(pc.less(table["id"], 20)), dataset / INDEX)
    found = problems(dataset)
    assert f"{INDEX}: has 20 rows, dataset.json states 21 samples" in found
    assert any("0 rows of train/train-000005.tar" in line for line in found)


@pytest.mark.parametrize(
    ("ids", "labels", "words"),
    [
        (np.arange(20), np.zeros(20), "has 20 labels for 21 samples"),
        (np.arange(21)[::-1], np.zeros(21), "ids are not 0, 1, 2"),
        (np.arange(21), np.full(21, 3), "id 0: label 3 is not among the 3 classes"),
    ],
)
def test_faulty_label_set(dataset: Path, ids: np.ndarray, labels: np.ndarray, words: str) -> None:
    write_label_set(dataset, ids, labels, "noisy")
    found = problems(dataset)
    assert any(line == f"train/labels/noisy.parquet: {words}" or words in line for line in found)
    assert not any("clean" in line for line in found)


def test_label_set_that_is_no_parquet(dataset: Path) -> None:
    (dataset / "train/labels/clean.parquet").write_bytes(b"nonsense")
    assert any("clean.parquet: cannot be read" in line for line in problems(dataset))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts["splits"]["train"].update(num_samples=22), "states 22 samples, its shards 21"),
        (lambda facts: facts["splits"]["train"]["shards"][0].pop("sha256"), "malformed"),
        (lambda facts: facts.update(classes=["ant", "ant", "cow"]), "a name twice"),
        (lambda facts: facts.update(splits={}), "'splits' is empty"),
    ],
)
def test_faulty_dataset_json(dataset: Path, change: Callable[[dict], None], words: str) -> None:
    edit_facts(dataset, change)
    assert any(words in line for line in problems(dataset)), problems(dataset)


def test_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset\.json"):
        verify(tmp_path)
    (tmp_path / "dataset.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="format version 1"):
        verify(tmp_path)


def test_exit_codes_and_report(dataset: Path, tmp_path: Path) -> None:
    def run(path: Path) -> subprocess.CompletedProcess[str]:
        tool = Path(__file__).parents[2] / "tools" / "verify.py"
        command = [sys.executable, str(tool), str(path), "--workers", "0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    fine = run(dataset)
    assert (fine.returncode, fine.stdout.count("\n")) == (0, 1)
    assert "21 samples in 6 shards: no problems" in fine.stdout
    (dataset / SHARD).unlink()
    broken = run(dataset)
    assert broken.returncode == 1
    assert broken.stdout.splitlines()[0].startswith(f"train: {SHARD}: cannot be opened")
    assert "1 problems" in broken.stdout
    assert run(tmp_path / "nowhere").returncode == 2
