"""Each raw layout is read as its owners wrote it, and foreign pickles are data, never code."""

import functools
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from nldist.data.make.sources.cifar import CifarSource
from nldist.data.make.sources.csv import CsvSource
from nldist.data.make.sources.digits import DigitsSource
from nldist.data.make.sources.folder import FolderSource
from nldist.data.make.sources.webdataset import IndexOptions, index_tars
from nldist.data.make.verify import verify
from nldist.data.make.writer import WriteOptions, write_split
from nldist.errors import UserError
from tests.data.conftest import CLASSES
from tests.data.test_writer import run_tool, shard, stock_samples
from tests.file_server import FileServer


def listed(source: Any) -> dict[str, int]:
    table = source.listing().table
    return dict(zip((os.fsdecode(p) for p in table["path"].to_pylist()), table["label"].to_pylist(), strict=True))


# Folder


def test_folder_agrees_with_torchvision(folder: Path) -> None:
    (folder / "bee/deeper").mkdir()
    (folder / "bee/001.png").rename(folder / "bee/deeper/1.png")
    theirs = torchvision.datasets.ImageFolder(str(folder))
    source = FolderSource(folder)
    assert listed(source) == {str(Path(path).relative_to(folder)): label for path, label in theirs.samples}
    assert source.listing().classes == theirs.classes
    assert source.read(b"bee/deeper/1.png", 10**6) == (folder / "bee/deeper/1.png").read_bytes()


@pytest.mark.parametrize(("name", "word"), [("nowhere", "not a directory"), ("ant", "no sub-directories")])
def test_folder_of_another_layout(folder: Path, name: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        FolderSource(folder / name).listing()


# CSV


def write_csv(path: Path, *rows: str, header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_csv_with_class_names(folder: Path) -> None:
    file = write_csv(folder / "list.csv", "cow/000.jpg,cow", '"ant/001.png","ant, the first"', "bee/000.jpg,cow")
    source = CsvSource(file, folder)
    assert source.listing().classes == ["ant, the first", "cow"]
    assert listed(source) == {"cow/000.jpg": 1, "ant/001.png": 0, "bee/000.jpg": 1}
    assert source.read(b"cow/000.jpg", 10**6) == (folder / "cow/000.jpg").read_bytes()


def test_csv_with_class_indices_and_other_columns(folder: Path) -> None:
    file = write_csv(folder / "list.csv", "7,2,cow/000.jpg", "8,0,ant/000.jpg", header="score,target,file")
    source = CsvSource(file, folder, "file", "target")
    assert source.listing().classes == ["0", "1", "2"]
    assert listed(source) == {"cow/000.jpg": 2, "ant/000.jpg": 0}
    named = CsvSource(file, folder, "file", "target", CLASSES)
    assert named.listing().classes == list(CLASSES)


@pytest.mark.parametrize(
    ("rows", "classes", "word"),
    [
        (["a.png,dog"], CLASSES, "dog"),
        (["a.png,3"], CLASSES, "label 3"),
        (["a.png,cow", ",cow"], None, "row 2 .*empty path"),
        (["a.png,cow", "b.png,"], None, "row 2 .*empty label"),
        ([], None, "no rows"),
        (["a.png,cow,more"], None, "cannot read"),
    ],
)
def test_csv_mistakes_are_named(tmp_path: Path, rows: list[str], classes: Any, word: str) -> None:
    with pytest.raises(UserError, match=word):
        CsvSource(write_csv(tmp_path / "list.csv", *rows), tmp_path, classes=classes).listing()


def test_csv_without_the_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target"):
        CsvSource(write_csv(tmp_path / "list.csv", "a,b"), tmp_path, label_column="target").listing()


def test_csv_split_takes_the_classes_of_the_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(folder, out)
    file = write_csv(folder / "list.csv", "cow/000.jpg,cow", "cow/gone.jpg,cow", "cow/000.jpg,bee")
    options = ("--split", "test", "--root", folder, "--workers", 0)
    done = run_tool("csv", file, out, *options, "--on-bad", "skip")
    assert done.returncode == 0, done.stderr
    assert "cow/gone.jpg: No such file" in done.stdout
    assert {s["__key__"]: s["cls"] for s in stock_samples(out, "test")} == {"cow/000": 1, "cow/000-2": 2}
    assert not verify(out).problems


# CIFAR


def cifar_batch(seed: int, count: int, key: str, num_classes: int) -> dict[bytes, Any]:
    generator = np.random.default_rng(seed)
    labels = [int(label) for label in generator.integers(0, num_classes, count)]
    pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"batch_label": b"made", key.encode(): labels, b"data": pixels, b"filenames": [b"a.png"] * count}


def write_pickle(path: Path, content: Any, protocol: int = 2) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def write_cifar10(root: Path) -> dict[str, dict[bytes, Any]]:
    batches = {f"data_batch_{n}": cifar_batch(n, 4, "labels", 10) for n in range(1, 6)}
    batches["test_batch"] = cifar_batch(6, 3, "labels", 10)
    for name, batch in batches.items():
        write_pickle(root / name, batch)
    write_pickle(root / "batches.meta", {b"label_names": [b"class %d" % n for n in range(10)]})
    return batches


def write_cifar100(root: Path) -> dict[str, dict[bytes, Any]]:
    batches = {name: cifar_batch(n, 5, "fine_labels", 100) for n, name in enumerate(("train", "test"))}
    for name, batch in batches.items():
        write_pickle(root / name, batch | {b"coarse_labels": [0] * 5})
    write_pickle(root / "meta", {b"fine_label_names": [b"class %d" % n for n in range(100)]})
    return batches


@pytest.mark.parametrize("variant", [10, 100])
def test_cifar_is_read_as_it_was_written(tmp_path: Path, variant: int) -> None:
    name = "cifar-10-batches-py" if variant == 10 else "cifar-100-python"
    batches = (write_cifar10 if variant == 10 else write_cifar100)(tmp_path / name)
    key = b"labels" if variant == 10 else b"fine_labels"
    for place in (tmp_path, tmp_path / name):
        for split in ("train", "test"):
            write_split(CifarSource(place, split), tmp_path / "out" / place.name, split, WriteOptions())
    out = tmp_path / "out" / name
    assert json.loads((out / "dataset.json").read_text())["classes"] == [f"class {n}" for n in range(variant)]
    samples = stock_samples(out) + stock_samples(out, "test")
    assert len(samples) == sum(len(batch[key]) for batch in batches.values())
    for sample in samples:
        file, row = sample["__key__"].split("/")
        expected = batches[file][b"data"][int(row)].reshape(3, 32, 32).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(sample["png"]), expected)
        assert sample["cls"] == batches[file][key][int(row)]


def test_cifar_pickle_of_python_2(tmp_path: Path) -> None:
    """The real files were written by Python 2: plain strings, and the old name of numpy's module."""
    array = pickle.dumps(np.arange(3072, dtype=np.uint8).reshape(1, 3072), 0)
    assert b"numpy._core.multiarray" in array
    write_cifar10(tmp_path)
    content = pickle.dumps({"labels": [3], "data": np.arange(3072).astype(np.uint8).reshape(1, 3072)}, 2)
    (tmp_path / "test_batch").write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    source = CifarSource(tmp_path, "test")
    assert listed(source) == {"test_batch/00000": 3}
    assert source.read(b"test_batch/00000", 0)[0, 1].tolist() == [1, 1, 1]


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "call",
    [
        lambda mark: _Call(os.system, f"touch {mark}"),
        lambda mark: _Call(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: _Call(functools.partial, print),
        lambda mark: _Call(np.load, str(mark)),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_is_refused_without_running_it(tmp_path: Path, call: Any, protocol: int) -> None:
    write_cifar10(tmp_path)
    mark = tmp_path / "mark"
    batch = cifar_batch(0, 2, "labels", 10)
    write_pickle(tmp_path / "test_batch", {b"first": call(mark), **batch}, protocol)
    with pytest.raises(UserError, match="asks for"):
        CifarSource(tmp_path, "test").listing()
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", [{b"labels": [1]}, {b"labels": [1], b"data": np.zeros((2, 3072), np.uint8)}, [1, 2], None]
)
def test_damaged_cifar_file(tmp_path: Path, content: Any) -> None:
    write_cifar10(tmp_path)
    write_pickle(tmp_path / "test_batch", content)
    with pytest.raises(UserError, match="test_batch"):
        CifarSource(tmp_path, "test").listing()
    (tmp_path / "data_batch_1").write_bytes((tmp_path / "data_batch_1").read_bytes()[:100])
    with pytest.raises(UserError, match="data_batch_1 is no CIFAR file"):
        CifarSource(tmp_path, "train").listing()


def test_directory_without_cifar(tmp_path: Path) -> None:
    done = run_tool("cifar", tmp_path, tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# Digits


def test_digits_are_stratified_and_lossless(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_split(DigitsSource(split), tmp_path, split, WriteOptions())
    digits = load_digits()
    seen = []
    for split, share in (("train", 0.8), ("test", 0.2)):
        samples = stock_samples(tmp_path, split)
        counts = np.bincount([sample["cls"] for sample in samples], minlength=10)
        np.testing.assert_allclose(counts, np.bincount(digits.target) * share, atol=1)
        for sample in samples:
            row = int(sample["__key__"])
            seen.append(row)
            assert sample["cls"] == digits.target[row]
            grey = np.asarray(sample["png"])[..., 0]
            np.testing.assert_array_equal(np.round(grey / 255 * 16), digits.images[row])
    assert sorted(seen) == list(range(1797))


# Foreign WebDataset tars


def png_bytes(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 123
            tar.addfile(info, io.BytesIO(data))
    return path


def foreign(root: Path, num_tars: int = 2, label: Any = None) -> Path:
    root.mkdir()
    for number in range(num_tars):
        members = {"__meta__": b"{}"}
        for row in range(3):
            key = f"deep/{number}{row}" + "x" * 120 * (row == 1)
            text = str((number + row) % 3).encode() if label is None else label(number, row)
            # label first in one tar, last in the other; another file beside
            parts = {f"{key}.PNG": png_bytes(10 * number + row), f"{key}.cls": text, f"{key}.txt": b"more"}
            members |= dict(reversed(parts.items())) if number else parts
        format_ = (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[number % 2]
        write_tar(root / f"their-{number:02d}.tar", members, format=format_)
    return root


def foreign_index(out: Path) -> dict[str, list[Any]]:
    return dict(pq.read_table(out / "train/index.parquet").to_pydict())


def test_foreign_tars_are_indexed_where_they_are(tmp_path: Path) -> None:
    theirs, out = foreign(tmp_path / "theirs"), tmp_path / "out"
    done = run_tool("webdataset", f"{theirs}/their-{{00..01}}.tar", out, "--split", "train", "--workers", 2)
    assert done.returncode == 0, done.stderr
    dataset = json.loads((out / "dataset.json").read_text())
    assert dataset["classes"] == ["0", "1", "2"]
    assert [Path(entry["path"]) for entry in dataset["splits"]["train"]["shards"]] == sorted(theirs.iterdir())
    assert not list(out.rglob("*.tar"))
    rows = foreign_index(out)
    assert rows["label"] == [0, 1, 2, 1, 2, 0]
    assert rows["key"] == [sample["__key__"] for sample in stock_samples(out, decode=False)]
    for number, (shard_number, offset, size) in enumerate(
        zip(rows["shard"], rows["offset"], rows["size"], strict=True)
    ):
        content = (theirs / f"their-{shard_number:02d}.tar").read_bytes()[offset : offset + size]
        assert content == png_bytes(10 * (number // 3) + number % 3)
    assert not verify(out).problems
    assert index_tars(f"{theirs}/*.tar", out, "train", IndexOptions()).was_complete


def test_labels_from_json_and_class_names(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    names = {"a": "cow", "b": 0, "c": "bee"}
    members: dict[str, bytes] = {}
    for key, value in names.items():
        members |= {f"{key}.png": png_bytes(1), f"{key}.json": json.dumps({"kind": value}).encode()}
    write_tar(theirs / "t.tar", members)
    options = IndexOptions(label_key="kind", classes=CLASSES)
    index_tars(str(theirs / "*.tar"), tmp_path / "out", "train", options)
    assert foreign_index(tmp_path / "out")["label"] == [2, 0, 1]


def test_bad_foreign_samples(tmp_path: Path) -> None:
    members = {
        "good.png": png_bytes(1),
        "good.cls": b" 2\n",
        "cut.png": png_bytes(1)[:40],
        "cut.cls": b"1",
        "nolabel.png": png_bytes(1),
        "noimage.cls": b"1",
        "word.png": png_bytes(1),
        "word.cls": b"dog",
        "minus.png": png_bytes(1),
        "minus.cls": b"-1",
    }
    path, out = write_tar(tmp_path / "t.tar", members), tmp_path / "out"
    with pytest.raises(UserError, match="5 of 6"):
        index_tars(str(path), out, "train", IndexOptions())
    summary = index_tars(str(path), out, "train", IndexOptions(on_bad="skip"))
    assert (summary.num_samples, foreign_index(out)["label"]) == (1, [2])
    reasons = {entry.path.rpartition(":")[2]: entry.reason for entry in summary.rejected}
    words = {"cut": "not an image", "nolabel": "no label", "noimage": "no image", "word": "dog", "minus": "range"}
    assert all(word in reasons[key] for key, word in words.items()), reasons


@pytest.mark.parametrize("where", ["data", "header"])
def test_damaged_foreign_tar_is_not_taken_in_silence(tmp_path: Path, where: str) -> None:
    theirs = foreign(tmp_path / "theirs")
    path = theirs / "their-00.tar"
    content = bytearray(path.read_bytes())
    if where == "data":
        content = content[:6000]
    else:
        content[content.rindex(b"deep/02")] = 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged|no valid header"):
        index_tars(f"{theirs}/*.tar", tmp_path / "out", "train", IndexOptions())


def test_same_keys_in_two_foreign_tars_are_told_apart(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"0.png": png_bytes(1), "0.cls": b"0"})
    index_tars(f"{tmp_path}/?.tar", tmp_path / "out", "train", IndexOptions())
    assert foreign_index(tmp_path / "out")["key"] == ["a/0", "b/0"]
    assert not verify(tmp_path / "out").problems
    with FileServer(tmp_path) as server:
        index_tars(f"{server.url}/{{a,b}}.tar?X-Signature=a.secret", tmp_path / "url", "train", IndexOptions())
    assert foreign_index(tmp_path / "url")["key"] == ["a/0", "b/0"]


@pytest.mark.parametrize(("pattern", "word"), [("nothing-*.tar", "no file matches"), ("pipe:touch {mark}", "command")])
def test_patterns_that_are_refused(tmp_path: Path, pattern: str, word: str) -> None:
    mark = tmp_path / "mark"
    pattern = pattern.format(mark=mark)
    with pytest.raises(UserError, match=word):
        index_tars(pattern, tmp_path / "out", "train", IndexOptions())
    assert not mark.exists()


def test_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match="no uncompressed tar"):
        index_tars(str(tmp_path / "t.tar"), tmp_path / "out", "train", IndexOptions())


def test_tars_behind_a_url(tmp_path: Path) -> None:
    theirs, out = foreign(tmp_path / "theirs"), tmp_path / "out"
    with FileServer(theirs) as server:
        url = f"{server.url.replace('//', '//me:secret@')}/their-{{00..01}}.tar?X-Signature=a.secret/b"
        server.faults = ["drop"]
        assert index_tars(url, out, "train", IndexOptions()).num_samples == 6
        assert not verify(out).problems
        with pytest.raises(UserError, match="it is not there") as raised:
            index_tars(url.replace("their", "none"), tmp_path / "none", "train", IndexOptions())
        assert "secret" not in str(raised.value)
        with pytest.raises(UserError, match="is not read"):
            index_tars(f"gs{url}", tmp_path / "gs", "train", IndexOptions())
        assert not (tmp_path / "gs").exists()
        server.faults = [404]
        (problem, *_) = map(str, verify(out).problems)
    assert "it is not there" in problem
    assert "secret" not in problem


def test_bad_samples_behind_a_url_are_listed_without_its_secrets(tmp_path: Path) -> None:
    theirs, out = foreign(tmp_path / "theirs", label=lambda number, row: b"-1" if row else b"1"), tmp_path / "out"
    with FileServer(theirs) as server:
        url = f"{server.url}/their-00.tar?X-Signature=secret"
        with pytest.raises(UserError) as raised:
            index_tars(url, out, "train", IndexOptions())
    assert "their-00.tar" in (out / "rejected.jsonl").read_text()
    assert "secret" not in (out / "rejected.jsonl").read_text() + str(raised.value)
