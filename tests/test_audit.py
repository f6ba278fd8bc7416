"""nldist audit: the real command on real and on hostile data sets, the page in a real browser."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nldist.cli.audit import main
from nldist.cli.noise import main as noise
from nldist.config.file import load_config
from nldist.data.index import Index
from nldist.data.samples import Samples
from nldist.run.directory import RunDirectory
from tests.browser import Opened, browser, needs_browser, opened
from tests.conftest import run_tool
from tests.file_server import FileServer
from tests.jobs import DIGITS, run_job
from tests.mlflow_server import client

HOSTILE = [
    "</script><script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    'quoted "twice", and a comma',
    "\u05e9\u05dc\u05d5\u05dd \u0639\u0631\u0628\u064a",
    "line\nbreak",
    "{{ 7 * 7 }} & 'single' =1+1",
]
N = 130


def write_run(run_dir: Path, index: Index, probability: np.ndarray, suggested: np.ndarray) -> Path:
    """A run directory with nothing but its settings and what it says."""
    (run_dir / "tables").mkdir(parents=True)
    config = load_config(DIGITS, [f"data.root={index.root}", f"run.dir={run_dir}", "data.label_set=null"])
    RunDirectory(run_dir).write_config(config)
    margin = np.linspace(-3, 3, len(index)).astype(np.float32)
    Samples(index.label, probability, suggested, margin, None, 3, 9).write(run_dir, index)
    return run_dir


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images whose names and classes are markup, quotes, line breaks and right-to-left text."""
    folder = tmp_path_factory.mktemp("hostile")
    photos, table = folder / "photos", folder / "table.csv"
    photos.mkdir()
    with table.open("w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(("path", "label"))
        for number in range(N):
            # Not a slash, which is none in a file's name.
            name = f"{number:03d} {HOSTILE[number % len(HOSTILE)].replace('/', '|')}.png"
            Image.new("RGB", (40, 30), (number, 255 - number, 90)).save(photos / name)
            rows.writerow((name, HOSTILE[number * 5 % 7 % len(HOSTILE)]))
    run_tool("tools/shard.py", "csv", table, folder / "data", "--split", "train", "--root", photos, "--workers", 0)
    index = Index.open(folder / "data", "train")
    probability = np.linspace(0, 1, N).astype(np.float32)
    probability[-2:] = np.nan
    suggested = (index.label + 1) % index.num_classes
    suggested[-2:] = -1
    run = write_run(folder / "run", index, probability, suggested)
    assert main([str(run), "--images", "100"]) == 0
    return run


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as running:
        yield running


@pytest.fixture
def page(chromium: Any, hostile: Path) -> Iterator[Opened]:
    with opened(chromium, hostile / "audit" / "index.html", accept_downloads=True) as found:
        yield found
        assert found.problems == []
        assert [url for url in found.requests if not url.startswith("file://")] == []
        assert found.page.title().startswith("Labels of data")


def test_a_finished_run_is_reported(digits: Path, tmp_path: Path) -> None:
    """Of a method without an opinion of its own, through a process as a user starts it."""
    run_dir = tmp_path / "run"
    settings = (f"data.root={digits}", "method.name=cross_entropy", "train.epochs=3", "track.enabled=true")
    assert run_job(run_dir, *settings) == [0]
    command = [sys.executable, "-m", "nldist.cli", "audit", str(run_dir)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    index = Index.open(digits, "train")
    table = pq.read_table(run_dir / "audit" / "labels.parquet").to_pydict()
    assert sorted(table["key"]) == sorted(index.keys(range(1437)))
    given, clean = index.labels("sym50"), index.labels("clean")
    wrong = {key for key, right in zip(index.keys(range(1437)), given == clean, strict=True) if not right}
    first = table["key"][: len(wrong)]
    assert np.mean([key in wrong for key in first]) > 0.7, "the most doubtful are mostly wrong"
    assert "1,437 labels are probably wrong" in done.stdout
    store = client(f"sqlite:///{tmp_path}/mlflow.db")
    (sent,) = store.search_runs([store.get_experiment_by_name("nldist").experiment_id])
    artifacts = {artifact.path for artifact in store.list_artifacts(sent.info.run_id, "audit")}
    assert artifacts == {f"audit/{name}" for name in ("index.html", "labels.csv", "labels.parquet", "duplicates.csv")}
    assert json.loads(data_of(run_dir / "audit" / "index.html"))["items"][0]["key"] == first[0]


def data_of(page: Path) -> str:
    """The JSON text in a page."""
    return page.read_text().partition('<script type="application/json" id="data">')[2].partition("</script>")[0]


def test_a_run_that_goes_on_is_reported_as_it_stands(digits: Path, tmp_path: Path) -> None:
    run_dir, settings = tmp_path / "run", (f"data.root={digits}", "train.epochs=4", "method.dividemix.warmup_epochs=1")
    assert run_job(run_dir, *settings, kill=(0, 120)) == [-9]
    assert main([str(run_dir)]) == 0
    samples = Samples.read(run_dir, Index.open(digits, "train"))
    assert 2 <= samples.num_epochs < samples.of_epochs == 4
    assert np.isnan(samples.margin).all()
    assert f"after epoch {samples.num_epochs} of 4" in (run_dir / "audit" / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "is not a run directory"),
        (["RUN", "--images", "0"], "--images is a number from 1"),
        (["RUN", "data.root=/nowhere"], "if it has moved, add data.root="),
        (["RUN", "--out", "RUN/config.yaml"], "cannot be written"),
    ],
)
def test_one_clear_line(arguments: list[str], words: str, hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.replace("RUN", str(hostile)) for word in arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert words in told


def test_tables_keep_every_name(hostile: Path) -> None:
    table = pq.read_table(hostile / "audit" / "labels.parquet").to_pydict()
    with (hostile / "audit" / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in ("key", "given"):
        assert [row[name] for row in rows] == table[name]
    assert set(table["given"]) == set(HOSTILE)
    assert [row["rank"] for row in rows[-2:]] == ["", ""]


@needs_browser
def test_names_are_text_and_run_nothing(page: Opened, hostile: Path) -> None:
    assert page.page.locator("#cards .card").count() == 60
    assert page.page.locator("img").count() == 60
    assert (
        page.page.evaluate("Promise.all([...document.images].map((image) => image.decode())).then((all) => all.length)")
        == 60
    )
    shown = set(page.texts("#cards .card dd bdi"))
    assert shown <= set(HOSTILE)
    assert len(shown) == len(HOSTILE)
    assert set(page.texts("#classes th bdi")) == set(HOSTILE)
    unseen = pq.read_table(hostile / "audit" / "labels.parquet")["key"].to_pylist()[-2:]
    assert page.texts("#unread li bdi") == unseen


@needs_browser
def test_filters_sorting_and_pages(page: Opened, hostile: Path) -> None:
    items = json.loads(data_of(hostile / "audit" / "index.html"))["items"]
    page.page.click("#after")
    assert page.texts("#page") == ["page 2 of 2"]
    assert page.page.locator("#cards .card").count() == 40
    assert page.page.is_disabled("#after")
    page.page.fill("#search", "042 ")
    assert page.page.locator("#cards .card").count() == 1
    page.page.click("#all")
    number = items[0]["given"]
    page.page.select_option("#given", str(number))
    assert page.page.locator("#cards .card").count() == sum(item["given"] == number for item in items)
    page.page.select_option("#sort", "sure")
    ranks = [int(text.split("#")[1].split()[0]) for text in page.texts("#cards .card .key")]
    assert ranks == sorted(ranks, reverse=True)
    cell = page.page.locator(".matrix button").first
    wanted = (int(cell.get_attribute("data-given")), int(cell.get_attribute("data-suggested")))
    cell.click()
    pair = [item for item in items if (item["given"], item["suggested"]) == wanted]
    assert page.page.locator("#cards .card").count() == len(pair) > 0


def downloaded(page: Opened, file: Path) -> list[dict[str, str]]:
    """The rows of what the button saves as `file`."""
    with page.page.expect_download() as download:
        page.page.click("#download")
    download.value.save_as(file)
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


@needs_browser
def test_marks_stay_and_go_into_a_label_set(page: Opened, hostile: Path, tmp_path: Path) -> None:
    first, second, third = page.page.locator("#cards .card").all()[:3]
    first.locator("button[data-mark=wrong]").click()
    second.focus()
    page.page.keyboard.press("r")
    page.page.keyboard.press("ArrowRight")
    page.page.keyboard.press("u")
    assert third.get_attribute("data-mark") == "unsure"
    page.page.keyboard.press("u")
    assert third.get_attribute("data-mark") == ""
    page.page.keyboard.press("w")
    page.page.reload()
    marks = [card.get_attribute("data-mark") for card in page.page.locator("#cards .card").all()]
    assert marks == ["wrong", "right", "wrong"] + [""] * 57
    assert "2 wrong, 1 right, 0 unsure" in page.texts("#told")[0]
    page.page.select_option("#marked", "right")
    assert page.page.locator("#cards .card").count() == 1
    assert len(downloaded(page, tmp_path / "marks.csv")) == 3

    items = json.loads(data_of(hostile / "audit" / "index.html"))["items"]
    root, labels = hostile.parent / "data", tmp_path / "labels"
    made = ["--marks", str(tmp_path / "marks.csv"), "--name", "marked", "--labels-dir", str(labels)]
    assert noise([str(root), *made]) == 0
    index = Index.open(root, "train", None, labels)
    changed = np.flatnonzero(index.labels("marked") != index.label)
    assert sorted(index.keys(changed)) == sorted(items[place]["key"] for place in (0, 2))
    assert all(index.labels("marked")[changed] == (index.label[changed] + 1) % len(HOSTILE))


@needs_browser
def test_another_class_than_the_suggested_one_can_be_named(page: Opened, tmp_path: Path) -> None:
    """Also of a label that the run does not doubt; a name that is no class is not taken."""
    page.page.select_option("#sort", "sure")
    card = page.page.locator("#cards .card").first
    card.focus()
    page.page.keyboard.press("w")
    box = card.locator("input")
    box.fill("no such class")
    box.press("Tab")
    assert downloaded(page, tmp_path / "before.csv")[0]["suggested"] != "no such class"
    box.fill(HOSTILE[2])
    box.press("Tab")
    (row,) = downloaded(page, tmp_path / "after.csv")
    assert (row["mark"], row["suggested"]) == ("wrong", HOSTILE[2])


@needs_browser
def test_marks_outlive_a_report_that_is_made_anew(chromium: Any, hostile: Path, tmp_path: Path) -> None:
    """Of fewer images: the marked one is not drawn any more."""
    run = tmp_path / "run"
    shutil.copytree(hostile, run)
    shutil.rmtree(run / "audit")
    assert main([str(run), "--images", "100"]) == 0
    with opened(chromium, run / "audit" / "index.html", accept_downloads=True) as found:
        found.page.select_option("#sort", "sure")
        card = found.page.locator("#cards .card").first
        key = card.locator(".key bdi").text_content()
        card.locator("button[data-mark=right]").click()
        assert main([str(run), "--images", "20"]) == 0
        found.page.reload()
        assert key not in found.texts("#cards .key bdi")
        assert "1 right" in found.texts("#told")[0]
        assert [row["key"] for row in downloaded(found, tmp_path / "marks.csv")] == [key]


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    """A run on 40 copies of one image under three classes, two of another under one, and one that was refused."""
    photos = tmp_path / "photos"
    for number in range(42):
        folder = photos / f"class{number % 3 if number < 40 else 0}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200, 10, 10 if number < 40 else 250)).save(folder / f"{number:02d}.png")
    (photos / "class1" / "broken.png").write_bytes(b"none")
    made = ["folder", photos, tmp_path / "data", "--split", "train", "--workers", 0, "--on-bad", "skip"]
    run_tool("tools/shard.py", *made)
    index = Index.open(tmp_path / "data", "train")
    return write_run(tmp_path / "run", index, np.linspace(0, 1, 42).astype(np.float32), (index.label + 1) % 3)


@needs_browser
def test_duplicates_are_shown_some_of_each_and_told_in_full(copies: Path, chromium: Any) -> None:
    assert main([str(copies), "--images", "20"]) == 0
    with (copies / "audit" / "duplicates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40, "the two of one class are no group"
    assert {(row["group"], row["kind"]) for row in rows} == {("1", "exact")}
    page = copies / "audit" / "index.html"
    assert len(json.loads(data_of(page))["pictures"]) <= 26
    with opened(chromium, page) as found:
        assert found.page.locator("#groups .card").count() == 6
        assert "40 times, 6 shown" in found.texts("#groups li")[0]
        assert "broken.png" in found.texts("#unread li")[0]
        # An image with two cards: both show its mark, also after the gallery was drawn anew.
        key = found.texts("#groups .key bdi")[0]
        for mark in ("unsure", "right"):
            found.page.locator("#groups .card").first.locator(f"button[data-mark={mark}]").click()
            cards = found.page.locator(".card").all()
            twins = [card for card in cards if card.locator(".key bdi").text_content() == key]
            assert [card.get_attribute("data-mark") for card in twins] == [mark, mark]
            found.page.select_option("#sort", "key")
        assert found.problems == []


@pytest.fixture
def remote(copies: Path) -> Iterator[Path]:
    """The same run, whose shards are on a real HTTP server that is named with a password and a signature."""
    root = copies.parent / "data"
    served = copies.parent / "served"
    served.mkdir()
    dataset = json.loads((root / "dataset.json").read_text())
    with FileServer(served) as server:
        for shard in dataset["splits"]["train"]["shards"]:
            name = Path(shard["path"]).name
            (root / shard["path"]).rename(served / name)
            shard["path"] = f"http://me:secret@127.0.0.1:{server.server_port}/{name}?X-Signature=secret"
        (root / "dataset.json").write_text(json.dumps(dataset))
        yield copies


def test_shards_elsewhere_are_read_through_the_cache_and_their_secrets_stay_there(
    remote: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cached = f"data.cache_dir={tmp_path / 'cache'}"
    assert main([str(remote), "--images", "20", cached]) == 0
    page = remote / "audit" / "index.html"
    assert len(json.loads(data_of(page))["pictures"]) >= 20
    told = "".join(capfd.readouterr())
    for text in (page.read_text(), (remote / "audit" / "labels.csv").read_text(), told):
        assert "secret" not in text
    assert main([str(remote)]) == 2
    told = capfd.readouterr().err
    assert "data.cache_dir" in told
    assert "secret" not in told
    for served in (remote.parent / "served").iterdir():
        served.unlink()
    assert main([str(remote), f"data.cache_dir={tmp_path / 'other'}"]) == 2
    told = capfd.readouterr().err
    assert "it is not there" in told
    assert "secret" not in told


def test_files_that_are_not_of_a_report_stay(copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "out" / "labels.csv"
    mine.parent.mkdir()
    mine.write_text("mine")
    assert main([str(copies), "--out", str(mine.parent)]) == 2
    assert "is not of an audit" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    mine.unlink()
    assert main([str(copies), "--out", str(mine.parent)]) == main([str(copies), "--out", str(mine.parent)]) == 0


@needs_browser
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_system_s_colours(
    width: int, scheme: str, chromium: Any, hostile: Path
) -> None:
    settings = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    with opened(chromium, hostile / "audit" / "index.html", **settings) as found:
        assert found.page.evaluate("document.documentElement.scrollWidth") <= width
        ground = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        assert found.problems == []
