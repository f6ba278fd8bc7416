"""`nldist predict`: the same answers as an evaluation's, for data sets, files and tars, on any number of ranks."""

import csv
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import nldist.cli
from nldist.data.index import Index
from tests.commands import Command, Done
from tests.conftest import run_tool
from tests.jobs import run_job
from tests.ranks import free_port

CPU = "dist.device=cpu"


@pytest.fixture(scope="module")
def run_dir(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two networks."""
    run_dir = tmp_path_factory.mktemp("predict") / "run"
    settings = ("train.epochs=2", "method.dividemix.warmup_epochs=1", "train.autocast=bf16")
    assert run_job(run_dir, f"data.root={digits}", *settings) == [0]
    return run_dir


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several kinds and sizes, in two classes."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(40):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (3, 3, 4 if number % 5 == 0 else 3), np.uint8)
        image = Image.fromarray(pixels).resize((10 + number, 30 - number // 2), Image.Resampling.BICUBIC)
        if number % 5 == 0:
            image.save(folder / f"{number:02}.png")  # with transparent parts
        elif number % 5 == 1:
            exif = Image.Exif()
            exif[0x0112] = 6  # to be turned
            image.save(folder / f"{number:02}.JPG", exif=exif)
        elif number % 5 == 2:
            image.convert("CMYK").save(folder / f"{number:02}.jpeg")
        elif number % 5 == 3:
            image.convert("P").save(folder / f"{number:02}.gif")
        else:
            image.save(folder / f"{number:02}.jpg")
    return root


def predict(tmp_path: Path, *arguments: object, **env: str) -> Done:
    return Command(nldist.cli.main, ["predict", *arguments, CPU], tmp_path / "told", {**os.environ, **env}).wait()


def predict_on(size: int, tmp_path: Path, *arguments: object) -> None:
    """On several ranks."""
    port = str(free_port())
    ranks = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = ["predict", *arguments, CPU]
    commands = [
        Command(
            nldist.cli.main,
            words,
            tmp_path / f"rank{rank}",
            {**os.environ, **ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]
    for done in [command.wait() for command in commands]:
        assert done.returncode == 0, done.stderr


def table(tmp_path: Path, *arguments: object) -> pa.Table:
    out = tmp_path / "out.parquet"
    done = predict(tmp_path, *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    return pq.read_table(out)


def assert_same(one: pa.Table, other: pa.Table) -> None:
    assert one.schema.names == other.schema.names
    for name in one.schema.names:
        if pa.types.is_floating(one.schema.field(name).type):
            np.testing.assert_allclose(one[name].to_numpy(), other[name].to_numpy(), atol=1e-6)
        elif name == "probabilities":
            np.testing.assert_allclose(matrix(one), matrix(other), atol=1e-6)
        else:
            assert one[name].to_pylist() == other[name].to_pylist(), name


def matrix(predictions: pa.Table) -> np.ndarray:
    rows = predictions["probabilities"].combine_chunks()
    flat: np.ndarray = rows.flatten().to_numpy()
    return flat.reshape(len(rows), -1)


def test_labels_are_those_of_the_evaluation(run_dir: Path, digits: Path, tmp_path: Path) -> None:
    found = table(tmp_path, run_dir, "--probabilities", "--top", 3)
    evaluation = Command(nldist.cli.main, ["evaluate", run_dir, CPU], tmp_path, os.environ).wait()
    index = Index.open(digits, "test")
    labels = found["label_id"].to_numpy()
    assert 100 * np.mean(labels == index.label) == json.loads(evaluation.stdout)["accuracy"]
    assert found["path"].to_pylist() == index.keys(range(360))
    assert found["label"].to_pylist() == [index.classes[label] for label in labels]
    probabilities = matrix(found)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(1), labels)
    ranked = -np.sort(-probabilities, axis=1)
    for place, name in enumerate(("probability", "probability_2", "probability_3")):
        np.testing.assert_array_equal(found[name].to_numpy(), ranked[:, place])
    third = [index.classes[c] for c in np.argsort(-probabilities, axis=1, kind="stable")[:, 2]]
    assert np.mean(np.array(third) == np.array(found["label_3"].to_pylist())) > 0.99  # but for equal ones
    assert json.loads(found.schema.metadata[b"classes"]) == index.classes


def test_any_number_of_ranks_gives_the_same(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for source in ([], [photos, tmp_path / "broken.jpg"]):
        arguments = [run_dir, *source, "--probabilities", "--top", 2, "train.eval_batch_size=7"]
        outs = [tmp_path / f"{len(source)}-{size}.parquet" for size in (1, 2, 3)]
        for size, out in enumerate(outs, start=1):
            predict_on(size, tmp_path, *arguments, "--out", out)
            assert_same(pq.read_table(outs[0]), pq.read_table(out))
        text = tmp_path / f"{len(source)}.csv"
        predict_on(2, tmp_path, run_dir, *source, "--out", text)
        rows = list(csv.DictReader(text.open(newline="")))
        assert [row["path"] for row in rows] == pq.read_table(outs[0])["path"].to_pylist()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "all that was in work is gone"


@pytest.mark.parametrize("resize", [None, 16])
def test_files_are_seen_as_they_would_be_in_shards(
    run_dir: Path, photos: Path, resize: int | None, tmp_path: Path
) -> None:
    option = [] if resize is None else ["--resize", resize]
    run_tool("tools/shard.py", "folder", photos, tmp_path / "data", "--split", "new", *option)
    sharded = table(tmp_path, run_dir, tmp_path / "data", "--split", "new", "--probabilities")
    (tmp_path / "out.parquet").unlink()
    loose = table(tmp_path, run_dir, photos, "--probabilities", *option, "data.num_workers=2")
    keys = [path.removeprefix(f"{photos}/").rpartition(".")[0] for path in loose["path"].to_pylist()]
    assert sorted(keys) == sorted(sharded["path"].to_pylist())
    places = [sharded["path"].to_pylist().index(key) for key in keys]
    np.testing.assert_allclose(matrix(sharded)[places], matrix(loose), atol=1e-6)
    assert loose["error"].null_count == 40


def test_files_are_shrunk_as_the_shards_of_the_run_were(photos: Path, tmp_path: Path) -> None:
    run_tool("tools/shard.py", "folder", photos, tmp_path / "data", "--split", "train", "--resize", 12)
    settings = ("method.name=cross_entropy", "data.label_set=null", "data.eval_split=train", "train.epochs=1")
    assert run_job(tmp_path / "run", f"data.root={tmp_path / 'data'}", *settings, "train.batch_size=8") == [0]
    sharded = table(tmp_path, tmp_path / "run", "--split", "train").sort_by("path")
    (tmp_path / "out.parquet").unlink()
    (tmp_path / "data").rename(tmp_path / "elsewhere")  # the weights' file has all that is needed
    loose = table(tmp_path, tmp_path / "run", photos).sort_by("path")
    np.testing.assert_allclose(sharded["probability"].to_numpy(), loose["probability"].to_numpy(), atol=1e-6)
    done = predict(tmp_path, tmp_path / "run")
    assert done.returncode == 2
    assert "data.root=ITS_PLACE" in done.stderr


RIGHT_TO_LEFT = "\u05e9\u05dc\u05d5\u05dd \u202e.jpg"
ODD = ('say "cheese".jpg', "a, b.jpg", "two\nlines.jpg", RIGHT_TO_LEFT, "=1+1.jpg", "caf\u00e9.jpg")


def test_odd_names_come_out_as_text(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in ODD:
        Image.new("RGB", (9, 9)).save(folder / name)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.jpg")).write_bytes((folder / ODD[0]).read_bytes())
    out = tmp_path / "out.csv"
    assert predict(tmp_path, run_dir, folder, "--out", out, "--top", 2).returncode == 0
    expected = sorted([*(f"{folder}/{name}" for name in ODD), f"{folder}/\\xff.jpg"])
    for text in (out.read_bytes().decode(), predict(tmp_path, run_dir, folder, "--top", 2).stdout):
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        assert sorted(row["path"] for row in rows) == expected
        assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows)


def test_files_patterns_tars_and_what_is_no_image(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(folder / "some.tar", "w") as tar:
        tar.add(photos, "inner")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".DS_Store").write_text("clutter")
    (folder / "loop").symlink_to(folder)
    loose = table(tmp_path, run_dir, f"{photos}/**/*.jpg", photos / "class0" / "00.png")
    names = [path.rpartition("/")[2] for path in loose["path"].to_pylist()]
    assert names == ["04.jpg", "14.jpg", "24.jpg", "34.jpg", "09.jpg", "19.jpg", "29.jpg", "39.jpg", "00.png"]
    answer_of = dict(zip(names, loose["probability"].to_pylist(), strict=True))
    (tmp_path / "out.parquet").unlink()
    done = predict(tmp_path, run_dir, folder)
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert len(rows) == 40
    for row in rows:
        assert row["path"].startswith(f"{folder}/some.tar/inner/class")
        name = row["path"].rpartition("/")[2]
        assert float(row["probability"]) == pytest.approx(answer_of.get(name, float(row["probability"])), abs=1e-6)
    assert "1 files without an image's extension" in done.stderr
    assert "notes.txt" in done.stderr
    assert done.stderr.endswith("40 images\n")


def test_bad_images_are_listed(run_dir: Path, photos: Path, tmp_path: Path) -> None:
    whole = (photos / "class0" / "04.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(whole[:-20])
    (tmp_path / "empty.png").touch()
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "page").write_text("<html>")
    names = [tmp_path / name for name in ("cut.jpg", "a.jpg", "empty.png", "gone.png", "page")]
    out = tmp_path / "out.parquet"
    done = predict(tmp_path, run_dir, *names, "--probabilities", "--out", out)
    assert done.returncode == 0, done.stderr
    found = pq.read_table(out)
    assert [label is None for label in found["label"].to_pylist()] == [True, False, True, True, True]
    assert np.isnan(matrix(found)).all(1).tolist() == [True, False, True, True, True]
    reasons = ("truncated", None, "empty file", "No such file", "not an image of a known kind")
    for reason, error in zip(reasons, found["error"].to_pylist(), strict=True):
        assert (error is None) if reason is None else (reason in error)
    assert "4 of them could not be read" in done.stderr
    for name in ("cut.jpg", "empty.png", "gone.png", "page"):
        assert done.stderr.count(f"left out: {tmp_path / name}:") == 1
    done = predict(tmp_path, run_dir, *names, "data.on_bad=refuse")
    assert done.returncode == 2
    assert "cut.jpg" in done.stderr


def test_what_is_refused(run_dir: Path, digits: Path, photos: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.csv"
    there.write_text("mine")
    (tmp_path / "cut.tar").write_bytes(b"x" * 2000)
    (tmp_path / "empty").mkdir()
    for words, told in (
        ([photos, "--out", there], "exists"),
        ([photos, "--out", tmp_path / "a.txt"], "ends in .parquet or .csv"),
        ([photos, "--out", tmp_path / "none" / "a.csv"], "no directory"),
        ([photos, "--out", tmp_path / "a.csv", "--probabilities"], "FILE.parquet"),
        ([photos, "--top", 11], "the run has 10 classes"),
        ([photos, "--split", "test"], "has no dataset.json"),
        ([digits, photos], "give it alone"),
        ([photos, digits], "give it alone"),
        ([digits, "--split", "other"], "no split 'other'"),
        ([tmp_path / "nothing.jpg"], "no such file"),
        ([tmp_path / "*.webp"], "nor any of this pattern"),
        ([tmp_path / "cut.tar"], "no uncompressed tar"),
        ([tmp_path / "empty"], "no images"),
    ):
        done = predict(tmp_path, run_dir, *words)
        assert done.returncode == 2, words
        assert told in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert there.read_text() == "mine"
