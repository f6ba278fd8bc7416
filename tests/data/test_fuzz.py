"""Whatever goes in: each image ends in the index with the label of a plain reading, or is named; never a traceback."""

import csv
import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nldist.data.make.verify import verify
from tests.data.command import Done, image_bytes, shard, write_tar

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
ORDINARY = settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=CHECKS)
SOAK = settings(ORDINARY, max_examples=5000, derandomize=False)


@contextmanager
def folder() -> Iterator[Path]:
    """A new directory for each example."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def outcome(root: Path) -> tuple[dict[int, str], int]:
    """The class of each image by its colour, and how many were refused."""
    facts = json.loads((root / "dataset.json").read_text())
    table = pq.read_table(root / "train/index.parquet")
    shards = [(root / entry["path"]).read_bytes() for entry in facts["splits"]["train"]["shards"]]
    found: dict[int, str] = {}
    for row in table.to_pylist():
        data = shards[row["shard"]][row["offset"] : row["offset"] + row["size"]]
        colour = Image.open(io.BytesIO(data)).convert("RGB").getpixel((0, 0))
        assert isinstance(colour, tuple)
        assert colour[0] not in found, "an image twice"
        found[colour[0]] = facts["classes"][row["label"]]
    assert table["key"].unique().to_pylist() == table["key"].to_pylist()
    assert not verify(root).problems
    return found, len(refused(root))


def refused(root: Path) -> list[dict[str, str]]:
    path = root / "rejected.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def well(done: Done) -> bool:
    """Whether it went well; if not, it was refused in one line."""
    return done.code == 0 or not done.error


# ---- trees

PARTS = st.sampled_from(["a", "b", "a.b", "10", "2", ".hid", "__MACOSX", "é", "e\u0301", "a b", "a-2", "nan", "-1"])
FILES = st.sampled_from(
    ["a.png", "a.jpg", "a", "a-2.png", "a.b.png", ".x.png", "._a.png", ".DS_Store", "é.png", "__a.png"]
)
PLACES = st.lists(st.tuples(st.lists(PARTS, min_size=0, max_size=3), FILES, st.booleans()), min_size=1, max_size=8)


def is_left_behind(parts: tuple[str, ...]) -> bool:
    *folders, name = parts
    if any(part.startswith(".") or part == "__MACOSX" for part in folders):
        return True
    return name.startswith("._") or name == ".DS_Store"


def check_tree(places: list[tuple[list[str], str, bool]]) -> None:
    with folder() as root:
        expected: dict[int, str] = {}
        num_bad = 0
        for colour, (folders, name, is_good) in enumerate(places):
            path = Path(root, "raw", *folders, name)
            if path.exists() or not _makes_way(path):
                continue
            path.write_bytes(image_bytes(colour) if is_good else b"bad")
            parts = path.relative_to(root / "raw").parts
            if len(parts) > 1 and not is_left_behind(parts):
                num_bad += not is_good
                expected |= {colour: parts[0]} if is_good else {}
        done = shard("folder", root / "raw", root / "out", "--on-bad", "skip")
        if not well(done):
            reasons = ("no sub-directories", "no image", "hold nothing but directories", "not a directory")
            assert any(reason in done.error for reason in reasons), done.error
            assert "hold nothing" in done.error or not expected
            return
        assert outcome(root / "out") == (expected, num_bad)


def _makes_way(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        return False
    return True


# ---- tars

KEYS = st.sampled_from(["x", "y", "d/x", "./x", "__x", "d/__y", "n.1", "n.2", "__MACOSX/x", ".h", "d/.h", "._x"])
LABELS = st.sampled_from(["0", "1", "2", " 1\n", "2.0", "cat", "-1", "nan", "1.5", "true", "", "٣"])
MEMBERS = st.lists(
    st.one_of(
        st.tuples(KEYS, st.sampled_from(["png", "jpg", "PNG", "input.png", "txt"]), st.just("")),
        st.tuples(KEYS, st.sampled_from(["cls", "CLS"]), LABELS),
    ),
    max_size=10,
)
PAIRS = st.lists(st.tuples(KEYS, LABELS), min_size=1, max_size=6).map(
    lambda pairs: [member for key, label in pairs for member in ((key, "png", ""), (key, "cls", label))]
)


def index_of(text: str) -> int | None:
    """A whole number from 0, however it is written."""
    try:
        value = float(text) if text.isascii() else -1.0
    except ValueError:
        return None
    return int(value) if value >= 0 and value.is_integer() else None


def meaning_of(texts: list[str]) -> Callable[[str], str | None]:
    """The class names of labels that define the classes, None for those that mean nothing."""
    stripped = [text.strip() for text in texts]
    has_numbers = any(index_of(text) is not None for text in stripped)

    def read(text: str) -> str | None:
        text = text.strip()
        if index_of(text) is not None:
            return str(index_of(text))
        if has_numbers or not text or text in ("nan", "true"):
            return None
        try:
            return None if text.isascii() and float(text) is not None else text
        except ValueError:
            return text

    return read


def plain_samples(members: list[tuple[str, str, str]]) -> tuple[dict[int, str], set[str]]:
    """The label of each image by its colour, and the keys that are refused for their members."""
    groups: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    for colour, (name, extension, label) in enumerate(members):
        path = f"{name}.{extension}"
        base, folders = path.rpartition("/")[2], path.rpartition("/")[0].split("/")
        if "__MACOSX" in folders or base.startswith("."):
            continue
        key = path[: len(path) - len(base)] + base.partition(".")[0]
        groups[key].append((base.partition(".")[2].lower(), str(colour), label))
    found: dict[int, str] = {}
    bad = set()
    for key, parts in groups.items():
        images = [part for part in parts if part[0] in ("png", "jpg")] or [
            part for part in parts if part[0].endswith(("png", "jpg"))
        ]
        labels = [part for part in parts if part[0] == "cls"] or [part for part in parts if part[0].endswith("cls")]
        if len(images) == len(labels) == 1:
            found[int(images[0][1])] = labels[0][2]
        else:
            bad.add(key)
    return found, bad


def check_tar(members: list[tuple[str, str, str]]) -> None:
    contents: list[tuple[str, Any]] = [
        (f"{key}.{extension}", label.encode() if extension.lower() == "cls" else image_bytes(colour))
        for colour, (key, extension, label) in enumerate(members)
    ]
    with folder() as root:
        tar = write_tar(root / "t.tar", contents)
        given, bad = plain_samples(members)
        read = meaning_of(list(given.values()))
        expected = {colour: name for colour, text in given.items() if (name := read(text)) is not None}
        done = shard("webdataset", tar, root / "out", "--on-bad", "skip")
        if not well(done):
            assert not expected, done.error
            return
        found, _ = outcome(root / "out")
        assert found == expected
        keys = {line["path"].rpartition(":")[2] for line in refused(root / "out")}
        assert bad <= keys
        assert len(keys) >= len(bad) + len(given) - len(expected)
        for key, text in stock(tar).items():  # each sample of stock WebDataset is one here, or refused
            names = pq.read_table(root / "out/train/index.parquet")["key"].to_pylist()
            assert key in names or key in keys or read(text) is None or key.startswith("__MACOSX/")


def stock(tar: Path) -> dict[str, str]:
    """The samples of stock WebDataset that have an image and a label; none where it refuses the tar."""
    try:
        samples = list(webdataset.WebDataset([str(tar)], shardshuffle=False))
    except ValueError:  # two members of one name
        return {}
    return {s["__key__"]: s["cls"].decode() for s in samples if {"png", "cls"} <= s.keys()}


# ---- tables

TEXTS = st.one_of(LABELS, st.sampled_from(["dog", "a,b", 'q"t', "two\nlines", "a;b", "t\tb", "é"]))
TABLES = st.tuples(
    st.one_of(
        st.lists(st.sampled_from(["0", "1.0", " 3", "2"]), min_size=1, max_size=6),
        st.lists(TEXTS, min_size=1, max_size=6),
    ),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.booleans(),
)


def check_table(table: tuple[list[str], str, str, bool]) -> None:
    labels, delimiter, encoding, has_known = table
    with folder() as root:
        text = io.StringIO(newline="")
        writer = csv.writer(text, delimiter=delimiter)
        writer.writerow(["more", "path", "label"])
        for number, label in enumerate(labels):
            (root / f"{number}.png").write_bytes(image_bytes(number))
            writer.writerow(["x", f"{number}.png", label])
        (root / "t.csv").write_bytes(text.getvalue().encode(encoding))
        (root / "names.txt").write_text("2\n1\ncat\n")
        options = ["--classes", root / "names.txt"] if has_known else []
        read = known_meaning if has_known else meaning_of(labels)
        expected = {number: read(label) for number, label in enumerate(labels)}
        done = shard("csv", root / "t.csv", root / "out", *options)
        if well(done):
            assert outcome(root / "out")[0] == expected
        else:
            assert None in expected.values()


def known_meaning(text: str) -> str | None:
    """Of the classes 2, 1, cat: 0 is an index, 1 a name and the index of the same class, and 2 of two classes."""
    text = text.strip()
    return {"0": "2", "1": "1", "cat": "cat"}.get(str(index_of(text)) if index_of(text) is not None else text)


# ---- the same in CI for a minute, and longer


@ORDINARY
@given(PLACES)
def test_trees(places: list[tuple[list[str], str, bool]]) -> None:
    check_tree(places)


@ORDINARY
@given(st.one_of(MEMBERS, PAIRS))
def test_tars(members: list[tuple[str, str, str]]) -> None:
    check_tar(members)


@ORDINARY
@given(TABLES)
def test_tables(table: tuple[list[str], str, str, bool]) -> None:
    check_table(table)


@pytest.mark.slow
@SOAK
@given(PLACES)
def test_many_trees(places: list[tuple[list[str], str, bool]]) -> None:
    check_tree(places)


@pytest.mark.slow
@SOAK
@given(st.one_of(MEMBERS, PAIRS))
def test_many_tars(members: list[tuple[str, str, str]]) -> None:
    check_tar(members)


@pytest.mark.slow
@SOAK
@given(TABLES)
def test_many_tables(table: tuple[list[str], str, str, bool]) -> None:
    check_table(table)
