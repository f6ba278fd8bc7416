"""Shards hold the sources, in the same bytes however they came to be."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from nldist.data.make.finish import Summary
from nldist.data.make.shards import header
from nldist.data.make.sources.folder import FolderSource
from nldist.data.make.writer import WriteOptions, write_split
from nldist.errors import UserError
from tests.data.conftest import CLASSES, write_folder

TOOL = Path(__file__).parents[2] / "tools" / "shard.py"


def shard(raw: Path, out: Path, split: str = "train", **changes: Any) -> Summary:
    options = WriteOptions(**{"shard_size": 4, "name": "zoo", **changes})
    return write_split(FolderSource(raw), out, split, options)


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def index(out: Path, split: str = "train") -> dict[str, list[Any]]:
    return dict(pq.read_table(out / split / "index.parquet").to_pydict())


def stock_samples(out: Path, split: str = "train", decode: bool = True) -> list[dict[str, Any]]:
    """What plain WebDataset reads from the shards."""
    shards = json.loads((out / "dataset.json").read_text())["splits"][split]["shards"]
    paths = [str(out / facts["path"]) for facts in shards]
    stream = webdataset.WebDataset(paths, shardshuffle=False)
    return list(stream.decode("pil") if decode else stream)


def test_stock_webdataset_reads_the_sources(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "out")
    samples = stock_samples(tmp_path / "out")
    sources = {str(path.relative_to(folder).with_suffix("")): path for path in folder.rglob("*.*")}
    assert sorted(sample["__key__"] for sample in samples) == sorted(sources)
    for sample in samples:
        path = sources[sample["__key__"]]
        expected = np.asarray(Image.open(path).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(sample[path.suffix[1:]]), expected)
        assert sample["cls"] == CLASSES.index(path.parent.name)


def test_index_points_at_the_images(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    summary = shard(folder, out)
    rows, facts = index(out), json.loads((out / "dataset.json").read_text())
    assert (summary.num_samples, summary.num_shards) == (21, 6)
    assert rows["id"] == list(range(21))
    assert rows["shard"] == sorted(rows["shard"])
    assert facts["classes"] == list(CLASSES)
    assert facts["name"] == "zoo"
    assert [entry["num_samples"] for entry in facts["splits"]["train"]["shards"]] == [4, 4, 4, 4, 4, 1]
    for key, number, offset, size, label in zip(
        *(rows[name] for name in ("key", "shard", "offset", "size", "label")), strict=True
    ):
        path = next(folder.glob(f"{key}.*"))
        content = (out / facts["splits"]["train"]["shards"][number]["path"]).read_bytes()
        assert content[offset : offset + size] == path.read_bytes()
        assert label == CLASSES.index(path.parent.name)


def test_order_is_random_but_fixed_by_the_seed(folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shard(folder, tmp_path / name, seed=seed, shard_size=100)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    keys = [index(tmp_path / name)["key"] for name in "ac"]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != sorted(keys[0])


def test_any_run_of_ids_is_a_fair_sample(tmp_path: Path) -> None:
    write_folder(tmp_path / "raw", (200, 100, 100))
    shard(tmp_path / "raw", tmp_path / "out", shard_size=64)
    labels = np.array(index(tmp_path / "out")["label"])
    for start in range(0, 400, 100):
        counts = np.bincount(labels[start : start + 100], minlength=3)
        assert np.abs(counts - [50, 25, 25]).max() < 16  # over 3 standard deviations


def test_number_of_workers_changes_no_byte(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "none")
    shard(folder, tmp_path / "two", num_workers=2)
    assert tree(tmp_path / "none") == tree(tmp_path / "two")


def test_tar_headers_carry_nothing_of_this_machine(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "out")
    with tarfile.open(tmp_path / "out/train/train-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


@pytest.mark.parametrize("name", ["a/b.jpg", "x" * 100, "x" * 101, "a/" * 60 + "b.cls", "ä.jpg", "a\tb.jpg", ""])
@pytest.mark.parametrize("size", [0, 7, 8**11 - 1, 8**11])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert header(name, size) == member.tobuf(tarfile.PAX_FORMAT)


def test_awkward_names_keep_their_samples_apart(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    names = [
        b"plain.png",
        b"plain.bmp",
        b"plain-2.png",
        b"two.dots.png",
        b"two_dots.png",
        b".png",
        b"none",
        "日本 ü\n.png".encode(),
        b"not utf8 \xff.png",
        b"x" * 180 + b".png",
        b"upper.PNG",
        b"deep.er/plain.png",
    ]
    for number, name in enumerate(names):
        path = raw / "__odd__" / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path, "PNG")
    shard(raw, tmp_path / "out", shard_size=5)
    samples = stock_samples(tmp_path / "out")
    assert len({sample["__key__"] for sample in samples}) == len(names)
    assert sorted(sample["png"].getpixel((0, 0))[0] for sample in samples) == list(range(len(names)))
    assert [sample["__key__"] for sample in samples] == index(tmp_path / "out")["key"]


def spoil(folder: Path) -> dict[str, str]:
    """Add bad files; returns a word of the reason by path."""
    good = (folder / "ant/000.jpg").read_bytes()
    (folder / "ant/cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "bee/empty.png").write_bytes(b"")
    (folder / "bee/notes.txt").write_text("not an image")
    (folder / "cow/gone.png").symlink_to(folder / "nowhere")
    Image.new("L", (2000, 1000)).save(folder / "cow/large.png")
    os.mkfifo(folder / "cow/pipe.png")
    return {
        "ant/cut.jpg": "runcated",
        "bee/empty.png": "empty",
        "bee/notes.txt": "not an image",
        "cow/gone.png": "No such file",
        "cow/large.png": "2000 x 1000 pixels",
        "cow/pipe.png": "not a regular file",
    }


def rejected(out: Path, split: str = "train") -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {line["path"]: line["reason"] for line in lines if line["split"] == split}


LIMIT = ("--max-pixels", 1_000_000, "--workers", 0, "--shard-size", 4)


def test_bad_files_are_refused_then_skipped(folder: Path, tmp_path: Path) -> None:
    reasons, out = spoil(folder), tmp_path / "out"
    refused = run_tool("folder", folder, out, "--split", "train", *LIMIT)
    assert refused.returncode == 2
    assert "6 of 27 images" in refused.stderr
    assert "--on-bad skip" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (out / "dataset.json").exists()
    assert not (out / "train/index.parquet").exists()
    assert rejected(out).keys() == reasons.keys()
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.tar")}

    skipped = run_tool("folder", folder, out, "--split", "train", "--on-bad", "skip", *LIMIT)
    assert skipped.returncode == 0, skipped.stderr
    assert "6 left out" in skipped.stdout
    assert {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.tar")} == kept
    found = rejected(out)
    assert all(reasons[path] in found[path] for path in reasons), found
    assert len(stock_samples(out)) == 21
    assert index(out)["id"] == list(range(21))


def test_a_jpeg_may_be_checked_by_its_header_alone(folder: Path, tmp_path: Path) -> None:
    """What is cut short is found all the same, broken tables are not."""
    whole = (folder / "ant/000.jpg").read_bytes()
    tables = whole.index(b"\xff\xc4")
    (folder / "ant/tables.jpg").write_bytes(whole[: tables + 5] + b"\xff" * 8 + whole[tables + 13 :])
    (folder / "ant/cut.jpg").write_bytes(whole[:-5])
    for check, refused in (("decode", ["ant/cut.jpg", "ant/tables.jpg"]), ("header", ["ant/cut.jpg"])):
        summary = shard(folder, tmp_path / check, check=check, on_bad="skip")
        assert sorted(entry.path for entry in summary.rejected) == refused
    with pytest.raises(UserError, match=r"other input or options \(check differ\)"):
        shard(folder, tmp_path / "decode", check="header", on_bad="skip")


def test_repaired_files_are_taken_by_the_next_run(folder: Path, tmp_path: Path) -> None:
    (folder / "ant/bad.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 22 images .*ant/bad\.png: empty file"):
        shard(folder, tmp_path / "out")
    Image.new("RGB", (5, 5)).save(folder / "ant/bad.png")
    assert shard(folder, tmp_path / "out").num_samples == 22
    assert not (tmp_path / "out/rejected.jsonl").exists()
    shard(folder, tmp_path / "undisturbed")
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_rejected_images_of_other_splits_are_kept(folder: Path, tmp_path: Path) -> None:
    (folder / "ant/bad.png").write_bytes(b"")
    for split in ("train", "test"):
        shard(folder, tmp_path / "out", split, on_bad="skip")
    assert rejected(tmp_path / "out", "train").keys() == rejected(tmp_path / "out", "test").keys() != set()
    assert sorted(json.loads((tmp_path / "out/dataset.json").read_text())["splits"]) == ["test", "train"]


def test_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "raw/ant").mkdir(parents=True)
    (tmp_path / "raw/ant/bad.png").write_bytes(b"")
    with pytest.raises(UserError, match="no image is left"):
        shard(tmp_path / "raw", tmp_path / "out", on_bad="skip")


@pytest.mark.parametrize(
    ("changes", "word"), [({"seed": 1}, "seed"), ({"shard_size": 5}, "shard_size"), ({"resize": 4}, "resize")]
)
@pytest.mark.parametrize("complete", [True, False])
def test_other_options_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], word: str, complete: bool
) -> None:
    if not complete:
        (folder / "ant/bad.png").write_bytes(b"")
        with pytest.raises(UserError, match="bad"):
            shard(folder, tmp_path / "out")
    else:
        shard(folder, tmp_path / "out")
    with pytest.raises(UserError, match=rf"{word} differ.*delete"):
        shard(folder, tmp_path / "out", **changes)


def test_other_input_is_refused(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "out")
    (folder / "ant/000.jpg").rename(folder / "ant/moved.jpg")
    with pytest.raises(UserError, match="listing differ"):
        shard(folder, tmp_path / "out")


def test_a_complete_split_is_left_alone(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "out")
    before = tree(tmp_path / "out")
    assert shard(folder, tmp_path / "out").was_complete
    assert tree(tmp_path / "out") == before


def test_splits_must_have_the_same_classes(folder: Path, tmp_path: Path) -> None:
    shard(folder, tmp_path / "out")
    (folder / "cow").rename(folder / "dog")
    with pytest.raises(UserError, match=r"missing here \['cow'\], only here \['dog'\]"):
        shard(folder, tmp_path / "out", "test")


def test_foreign_files_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/train-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match="not written by this tool"):
        shard(folder, tmp_path / "out")


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        shard(folder, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "arguments", [["--shard-size", "0"], ["--split", "a/b"], ["--workers", "-1"], ["--resize", "0"]]
)
def test_senseless_options_are_user_errors(folder: Path, tmp_path: Path, arguments: list[str]) -> None:
    done = run_tool("folder", folder, tmp_path / "out", "--split", "train", *arguments)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:6]) == (2, 1, "error:")


def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", (60, 60, 60))
    Image.effect_noise((700, 700), 50).save(raw / "ant/slow.png")
    for number in range(12):  # big enough that a kill lands inside a shard
        (raw / f"bee/slow{number}.png").write_bytes((raw / "ant/slow.png").read_bytes())
    options = ("--split", "train", "--shard-size", 6, "--workers", 2, "--name", "zoo")
    shard(raw, tmp_path / "undisturbed", shard_size=6)
    out, num_killed, seen = tmp_path / "out", 0, Counter[int]()
    command = [sys.executable, str(TOOL), "folder", str(raw), str(out), *map(str, options)]
    for num_shards in (1, 10, 19):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list((out / "train/.build").glob("*.parquet"))) < num_shards:
            time.sleep(0.005)
        process.kill()
        num_killed += process.wait() == -9
        seen[len(list((out / "train").glob("*.tar")))] += 1
        assert not (out / "dataset.json").exists() or process.returncode == 0
    assert num_killed >= 2
    assert len(seen) >= 2
    done = run_tool("folder", raw, out, *options)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while tree(out) != tree(tmp_path / "undisturbed") and time.monotonic() < deadline:
        time.sleep(0.1)  # a worker of the last killed run may be on its way out
    assert tree(out) == tree(tmp_path / "undisturbed")
