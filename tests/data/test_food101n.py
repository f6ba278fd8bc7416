"""Food-101N as it is distributed, with Food-101's test images, through the command."""

import shutil
from pathlib import Path

import pytest

from tests.data.command import Done, classes, label_names, nldist, rejected
from tests.data.published import jpeg, lines

CLASSES = ["apple_pie", "baby_back_ribs", "waffles"]


def food101n(root: Path, food101: Path) -> Path:
    names = [f"{name}/{name[0]}{row}.jpg" for name in CLASSES for row in range(3)]
    lines(root / "meta/imagelist.tsv", ["class_name/key", *names])
    lines(root / "meta/classes.txt", ["class_name", *CLASSES])
    tests = [f"{name}/{1000 + row}" for name in CLASSES for row in range(2)]
    lines(food101 / "meta/test.txt", tests)
    for number, name in enumerate(names):
        jpeg(root / "images" / name, number)
    for number, name in enumerate([*tests, "apple_pie/1"]):  # the last one is of Food-101's own training images
        jpeg(food101 / f"images/{name}.jpg", number)
    return root


def shard(raw: Path, out: Path, *options: object) -> Done:
    return nldist("shard", "food101n", raw, out, "--workers", 0, *options)


@pytest.mark.parametrize("place", ["raw/food-101", "food-101", "other/place"])
def test_both_splits(tmp_path: Path, place: str) -> None:
    raw = food101n(tmp_path / "raw", tmp_path / place)
    options = ("--food101", tmp_path / place) if "other" in place else ()
    done = shard(raw, tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert classes(tmp_path / "out") == CLASSES
    assert label_names(tmp_path / "out") == {f"{name}/{name[0]}{row}": name for name in CLASSES for row in range(3)}
    expected = {f"{name}/{1000 + row}": name for name in CLASSES for row in range(2)}
    assert label_names(tmp_path / "out", "test") == expected


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    raw = food101n(tmp_path / "raw", tmp_path / "food-101")
    (raw / "images/waffles/w1.jpg").unlink()
    assert shard(raw, tmp_path / "out", "--on-bad", "skip").code == 0
    assert rejected(tmp_path / "out").keys() == {"waffles/w1.jpg"}
    shutil.rmtree(raw / "images/waffles")
    assert "lacks 1 of the 3 directories that its lists name, such as 'waffles/'" in shard(raw, tmp_path / "b").error
    shutil.rmtree(tmp_path / "food-101")
    assert "raw lacks Food-101 (no meta/test.txt in" in shard(raw, tmp_path / "c").error
    (raw / "meta/imagelist.tsv").unlink()
    assert "raw lacks meta/imagelist.tsv, Food-101" in shard(raw, tmp_path / "c").error


def test_a_class_that_is_not_in_the_list_of_classes(tmp_path: Path) -> None:
    raw = food101n(tmp_path / "raw", tmp_path / "food-101")
    lines(raw / "meta/classes.txt", CLASSES[:2])
    assert "names classes that meta/classes.txt does not have: 'waffles'" in shard(raw, tmp_path / "out").error
