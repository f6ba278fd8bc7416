"""Folders and tables as people have them: read as a plain reading would, or told."""

import csv
import io
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from nldist.data.index import Index
from nldist.data.make.sources.csv import read_table
from tests.data.command import (
    classes,
    label_names,
    nldist,
    rejected,
    shard,
    shard_well,
    write_image,
)

# ---- folders


def tree(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        write_image(root / name, number)
    return root


PLAIN = ("ant/0.png", "ant/1.png", "bee/2.png")


def test_what_systems_leave_behind_is_no_class_and_no_sample(tmp_path: Path) -> None:
    clutter = (
        ".ipynb_checkpoints/0.png",
        "__MACOSX/ant/._0.png",
        "@eaDir/0.png",
        ".git/x/0.png",
        "ant/.ipynb_checkpoints/0-checkpoint.png",
        "ant/deep/__MACOSX/0.png",
        "ant/._0.png",
        "ant/.DS_Store",
        "bee/Thumbs.db",
        ".DS_Store",
    )
    raw = tree(tmp_path / "raw", *PLAIN, *clutter, "bee/.hidden.png", "bee/desktop.ini.png")
    out = shard_well("folder", raw, tmp_path / "out")
    assert classes(tmp_path / "out") == ["ant", "bee"]
    assert label_names(tmp_path / "out").keys() == {"ant/0", "ant/1", "bee/2", "bee/_hidden", "bee/desktop_ini"}
    assert "5 hidden directories and files of systems were left out: 'ant/" in out


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_links_in_circles_multiply_no_images(tmp_path: Path, target: str) -> None:
    raw = tree(tmp_path / "raw", *PLAIN)
    (raw / "ant/self").symlink_to(target)
    printed = shard_well("folder", raw, tmp_path / "out")
    assert label_names(tmp_path / "out").keys() == {"ant/0", "ant/1", "bee/2"}
    assert "1 links to a directory that they lie in were left out: 'ant/self'" in printed


def test_links_of_two_classes_to_each_other_are_followed_once(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", *PLAIN)
    (raw / "ant/more").symlink_to("../bee")
    (raw / "bee/more").symlink_to("../ant")
    shard_well("folder", raw, tmp_path / "out")
    expected = {"ant/0": "ant", "ant/1": "ant", "ant/more/2": "ant", "bee/2": "bee"}
    assert label_names(tmp_path / "out") == expected | {"bee/more/0": "bee", "bee/more/1": "bee"}


def test_links_to_images_elsewhere_are_followed(tmp_path: Path) -> None:
    store = tree(tmp_path / "store", "x/0.png", "x/1.png")
    raw = tree(tmp_path / "raw", *PLAIN)
    (raw / "cow").symlink_to(store / "x")
    (raw / "bee/more").symlink_to(store)
    shard_well("folder", raw, tmp_path / "out")
    expected = {"ant/0", "ant/1", "bee/2", "bee/more/x/0", "bee/more/x/1", "cow/0", "cow/1"}
    assert label_names(tmp_path / "out").keys() == expected


def test_a_class_whose_name_is_not_utf_8_is_told(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", *PLAIN)
    (raw / os.fsdecode(b"caf\xe9")).mkdir()
    assert "'caf\\udce9' has no name in UTF-8" in shard("folder", raw, tmp_path / "out").error


def test_a_test_split_that_lacks_a_class_is_told_and_then_allowed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard_well("folder", tree(tmp_path / "train", *PLAIN), out)
    test = tree(tmp_path / "test", "bee/0.png")
    error = shard("folder", test, out, split="test").error
    assert "missing here ['ant']" in error
    assert "--classes FILE" in error
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    printed = shard_well("folder", test, out, "--classes", tmp_path / "names.txt", split="test")
    assert label_names(out, "test") == {"bee/0": "bee"}
    assert "1 of 2 classes have no image: 'ant'" in printed


def test_a_directory_that_is_none_of_the_listed_classes_is_told(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("bee\ncow\n")
    error = shard("folder", tree(tmp_path / "raw", *PLAIN), tmp_path / "out", "--classes", tmp_path / "names.txt").error
    assert "'ant' are directories of none of the classes 'bee', 'cow'" in error


def test_files_beside_the_class_directories_are_told(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", *PLAIN, "loose.png")
    (raw / "README.txt").write_text("x")
    printed = shard_well("folder", raw, tmp_path / "out")
    assert "2 files beside the class directories are in no class: 'README.txt', 'loose.png'" in printed


def test_an_empty_class_directory_is_told(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", *PLAIN)
    (raw / "cow").mkdir()
    assert "1 of 3 classes have no image: 'cow'" in shard_well("folder", raw, tmp_path / "out")


@pytest.mark.parametrize("tops", [["train", "val"], ["images"]])
def test_a_root_one_level_too_high_is_told(tmp_path: Path, tops: list[str]) -> None:
    raw = tree(tmp_path / "raw", *(f"{top}/{name}" for top in tops for name in PLAIN))
    error = shard("folder", raw, tmp_path / "out").error
    assert "hold nothing but directories, all of them 'ant', 'bee'" in error
    assert str(raw / tops[0]) in error
    (tmp_path / "names.txt").write_text("\n".join(tops))
    shard_well("folder", raw, tmp_path / "out", "--classes", tmp_path / "names.txt")
    assert classes(tmp_path / "out") == tops


def test_classes_of_classes_are_read(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", "birds/crow/0.png", "birds/owl/1.png", "fish/eel/2.png")
    shard_well("folder", raw, tmp_path / "out")
    assert label_names(tmp_path / "out") == {"birds/crow/0": "birds", "birds/owl/1": "birds", "fish/eel/2": "fish"}


def test_class_names_of_another_unicode_form_are_the_same_classes(tmp_path: Path) -> None:
    """Train packed on Linux, test on macOS."""
    out = tmp_path / "out"
    names = ["café/0.png", "thé/0.png"]
    shard_well("folder", tree(tmp_path / "train", *(unicodedata.normalize("NFC", name) for name in names)), out)
    test = tree(tmp_path / "test", *(unicodedata.normalize("NFD", name) for name in names))
    shard_well("folder", test, out, split="test")
    assert classes(out) == ["café", "thé"]
    assert set(label_names(out, "test").values()) == {"café", "thé"}


# ---- tables


def excel(rows: Sequence[Sequence[str]], delimiter: str = ",", encoding: str = "utf-8") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode(encoding)


ROWS = [
    ["id", "path", "label", "remark"],
    ["7", "0.png", "cat", "of\ntwo lines"],
    ["8", "1.png", "dog, big", 'a "q"; b\tc'],
]
TABLES = {
    "commas": excel(ROWS),
    "semicolons": excel(ROWS, ";"),
    "tabs": excel(ROWS, "\t"),
    "byte-order mark": excel(ROWS, encoding="utf-8-sig"),
    "utf-16": excel(ROWS, ";", "utf-16"),
    "utf-16 big-endian": b"\xfe\xff" + excel(ROWS, "\t", "utf-16-be"),
    "another case": excel([["ID", " Path", "LABEL ", "remark"], *ROWS[1:]]),
    "blank lines": b"\n\n" + excel([*ROWS, []]),
    "old Mac": b'path,label\r0.png,cat\r1.png,"dog, big"\r',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_all_sorts_are_read(tmp_path: Path, name: str) -> None:
    raw = tree(tmp_path / "raw", "0.png", "1.png")
    (raw / "list.csv").write_bytes(TABLES[name])
    shard_well("csv", raw / "list.csv", tmp_path / "out")
    assert label_names(tmp_path / "out") == {"0": "cat", "1": "dog, big"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            excel([["file", "class"], ["0.png", "cat"]]),
            "no column path, label (or more than one) among 'file', 'class'",
        ),
        (excel([["file", "class"], ["0.png", "cat"]], ";"), "among 'file', 'class'"),
        (excel([["path", "label", "label"], ["0.png", "cat", "dog"]]), "no column label (or more than one)"),
        (excel([["path", "Label", "LABEL"], ["0.png", "cat", "dog"]]), "no column label (or more than one)"),
        ("path,label\n0.png,caf\xe9\n".encode("latin-1"), "save it in UTF-8"),
        ("caf\xe9,path,label\n,0.png,x\n".encode("latin-1"), "save it in UTF-8"),
        (b"", "it is empty"),
        (b"path,label\n", "has no rows"),
        (b"path,label\n0.png,cat\n1.png, \n", "row 2 below the header has an empty label"),
        (b'path,label\n"0.png,cat\n', "cannot read columns"),
        (b"path,label\n0.png,cat,x\n", "cannot read columns"),
        (b"\xff\xfea", "cannot read columns"),
        (os.urandom(3000), "cannot read columns"),
    ],
)
def test_tables_that_cannot_be_read_are_told(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    error = shard("csv", tmp_path / "list.csv", tmp_path / "out").error
    assert words in error
    assert "list.csv" in error


@pytest.mark.parametrize(
    "make", [lambda text: text.encode("utf-8-sig"), lambda text: text.encode("utf-16"), str.encode]
)
def test_class_names_of_spreadsheets(tmp_path: Path, make: Callable[[str], bytes]) -> None:
    raw = tree(tmp_path / "raw", "0.png", "1.png")
    (raw / "list.csv").write_bytes(TABLES["commas"])
    (tmp_path / "names.txt").write_bytes(make("dog, big\r\ncat \r\n"))
    shard_well("csv", raw / "list.csv", tmp_path / "out", "--classes", tmp_path / "names.txt")
    assert classes(tmp_path / "out") == ["dog, big", "cat"]
    assert label_names(tmp_path / "out") == {"0": "cat", "1": "dog, big"}


def test_tables_are_read_as_csv_reads_them(tmp_path: Path) -> None:
    rows = [
        ["path", "label"],
        ["a b.png", "x"],
        ['"q".png', "y,z"],
        ["n\nl.png", "w"],
        ["é.png", "0"],
        ["'.png", "1.0"],
    ]
    (tmp_path / "list.csv").write_bytes(excel(rows))
    paths, labels = read_table(tmp_path / "list.csv", "path", "label")
    with (tmp_path / "list.csv").open(newline="") as file:
        theirs = list(csv.DictReader(file))
    assert [path.decode() for path in paths.to_pylist()] == [row["path"] for row in theirs]
    assert labels.to_pylist() == [row["label"] for row in theirs]


def test_paths_of_windows_and_of_another_unicode_form(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", "deep/thé.png", "deep/caf\u0065\u0301.png", "deep/x.png")
    nfd, nfc = unicodedata.normalize("NFD", "thé"), unicodedata.normalize("NFC", "cafe\u0301")
    (raw / "list.csv").write_text(f"path,label\ndeep\\{nfd}.png,0\ndeep\\{nfc}.png,1\ndeep\\x.png,2\n")
    out = tmp_path / "out"
    shard_well("csv", raw / "list.csv", out)
    assert label_names(out) == {f"deep/{nfd}": "0", f"deep/{nfc}": "1", "deep/x": "2"}
    (raw / "noisy.csv").write_text(
        "path,label\n" + "raw\\deep\\thé.png,1\nraw\\deep\\cafe\u0301.png,2\nraw\\deep\\x.png,0\n"
    )
    assert nldist("noise", out, "--csv", raw / "noisy.csv", "--name", "l").code == 0
    index = Index.open(out, "train")
    expected = {f"deep/{nfd}": 1, f"deep/{nfc}": 2, "deep/x": 0}
    assert dict(zip(index.keys(range(3)), index.labels("l").tolist(), strict=True)) == expected


def test_a_backslash_in_a_name_of_this_system_stays(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", "a\\b.png")
    (raw / "list.csv").write_text("path,label\na\\b.png,x\n")
    shard_well("csv", raw / "list.csv", tmp_path / "out")
    assert label_names(tmp_path / "out") == {"a\\b": "x"}


# ---- images of one stem


def twins(root: Path) -> Path:
    for number, name in enumerate(("a.jpg", "a.png", "a.bmp", "a-2.png", "b.png")):
        path = root / "x" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (40 * number, 0, 0)).save(path)
    return root


TWINS = {"x/a.jpg": "jpg", "x/a.png": "png", "x/a.bmp": "bmp", "x/a-2.png": "two", "x/b.png": "b"}


def add_set(out: Path, rows: dict[str, str], name: str) -> dict[str, str]:
    file = out.parent / f"{name}.csv"
    file.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows.items()))
    done = nldist("noise", out, "--csv", file, "--name", name)
    if done.code:
        return {"error": done.error}
    index = Index.open(out, "train")
    return {key: index.classes[y] for key, y in zip(index.keys(range(len(index))), index.labels(name), strict=True)}


def test_images_of_one_stem_are_told_apart_in_label_tables(tmp_path: Path) -> None:
    raw, out = twins(tmp_path / "raw"), tmp_path / "out"
    (raw / "list.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in TWINS.items()))
    shard_well("csv", raw / "list.csv", out)
    given = label_names(out)
    assert add_set(out, dict(reversed(TWINS.items())), "same") == given
    assert add_set(out, {f"root/{path}": label for path, label in TWINS.items()}, "below") == given
    assert "no row for 1 of 5" in add_set(out, {p: y for p, y in TWINS.items() if p != "x/a.png"}, "less")["error"]


def test_images_of_one_stem_that_are_not_all_samples_are_refused(tmp_path: Path) -> None:
    raw, out = twins(tmp_path / "raw"), tmp_path / "out"
    some = {path: label for path, label in TWINS.items() if path != "x/a.bmp"}
    (raw / "list.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in some.items()))
    (tmp_path / "names.txt").write_text("\n".join(TWINS.values()))
    shard_well("csv", raw / "list.csv", out, "--classes", tmp_path / "names.txt")
    assert "two rows for 'x/a' disagree" in add_set(out, TWINS, "more")["error"]
    assert add_set(out, some, "same") == label_names(out)


def test_images_of_one_stem_of_which_one_was_left_out(tmp_path: Path) -> None:
    raw, out = twins(tmp_path / "raw"), tmp_path / "out"
    (raw / "x/a.bmp").write_bytes(b"bad")
    (raw / "list.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in TWINS.items()))
    shard_well("csv", raw / "list.csv", out, "--on-bad", "skip")
    assert rejected(out).keys() == {"x/a.bmp"}
    assert add_set(out, TWINS, "same") == label_names(out)
