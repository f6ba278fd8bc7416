"""A label keeps its meaning, from tables, .cls, .json, folders and label sets alike, or is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nldist.data.index import Index
from tests.data.command import (
    classes,
    image_bytes,
    label_names,
    nldist,
    rejected,
    shard,
    shard_well,
    write_image,
    write_table,
    write_tar,
)

TWELVE = [str(number) for number in range(12)]
FOLDERS = [str(number) for number in range(1, 13)]


def names(folder: Path, labels: Sequence[str], prefix: str = "") -> dict[str, str]:
    return {f"{prefix}{number}": label for number, label in enumerate(labels)}


def folder_of(root: Path, names: Sequence[str]) -> Path:
    for number, name in enumerate(names):
        write_image(root / name / f"{number}.png", number)
    return root


# ---- tables


@pytest.mark.parametrize(
    "train", [[f"{n}.0" for n in range(12)], [f" {n}" for n in range(12)], [f"{n:02d}" for n in range(12)], TWELVE]
)
def test_whole_numbers_are_class_indices_however_they_are_written(tmp_path: Path, train: list[str]) -> None:
    out = tmp_path / "out"
    shard_well("csv", write_table(tmp_path / "train.csv", train), out)
    shard_well("csv", write_table(tmp_path / "test.csv", TWELVE), out, split="test")
    assert classes(out) == TWELVE
    for split in ("train", "test"):
        assert label_names(out, split) == names(tmp_path, TWELVE)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ("-1", "-1 is out of range"),
        ("nan", "nan is no class index"),
        ("NaN", "NaN is no class index"),
        ("1.7", "1.7 is no class index"),
        ("1e999", "1e999 is no class index"),
        ("inf", "inf is no class index"),
        ("true", "true is no class index"),
        ("False", "False is no class index"),
        ("unknown", "'unknown' is no class index"),
        ("999999999", "999999999 is too large"),
    ],
)
def test_one_label_that_is_no_index_among_indices_is_refused(tmp_path: Path, odd: str, words: str) -> None:
    table = write_table(tmp_path / "train.csv", [*TWELVE[:7], odd, *TWELVE[7:]])
    error = shard("csv", table, tmp_path / "out").error
    assert words in error
    assert "train.csv" in error
    assert "row 8 below the header" in error or odd == "999999999"
    assert not (tmp_path / "out/dataset.json").exists()


@pytest.mark.parametrize("odd", ["nan", "-1", "1.5", "TRUE"])
def test_no_number_or_boolean_becomes_a_class_name_unless_it_is_listed(tmp_path: Path, odd: str) -> None:
    table = write_table(tmp_path / "train.csv", ["cat", odd, "dog"])
    assert "row 2 below the header" in shard("csv", table, tmp_path / "out").error
    (tmp_path / "names.txt").write_text(f"dog\n{odd}\ncat\n")
    shard_well("csv", table, tmp_path / "out", "--classes", tmp_path / "names.txt")
    assert label_names(tmp_path / "out") == {"0": "cat", "1": odd, "2": "dog"}


def test_blanks_and_unicode_forms_make_no_other_classes(tmp_path: Path) -> None:
    table = write_table(tmp_path / "train.csv", ["café", " cafe\u0301 ", "tea", "tea "])
    shard_well("csv", table, tmp_path / "out")
    assert len(classes(tmp_path / "out")) == 2
    found = label_names(tmp_path / "out")
    assert found["0"] == found["1"]
    assert found["2"] == found["3"] == "tea"


def test_names_of_many_digits_are_names(tmp_path: Path) -> None:
    labels = ["4006381333931", "4006381333930"]
    shard_well("csv", write_table(tmp_path / "train.csv", labels), tmp_path / "out")
    assert label_names(tmp_path / "out") == names(tmp_path, labels)


@pytest.mark.parametrize("reading", ["names", "indices"])
def test_the_user_says_whether_numbers_are_names(tmp_path: Path, reading: str) -> None:
    table = write_table(tmp_path / "train.csv", ["10", "2", "5"])
    shard_well("csv", table, tmp_path / "out", "--labels", reading)
    assert label_names(tmp_path / "out") == {"0": "10", "1": "2", "2": "5"}
    assert classes(tmp_path / "out") == (["2", "5", "10"] if reading == "names" else TWELVE[:11])


def test_labels_from_1_show_as_an_empty_class(tmp_path: Path) -> None:
    out = shard_well("csv", write_table(tmp_path / "train.csv", range(1, 5)), tmp_path / "out")
    assert "1 of 5 classes have no image: '0'" in out


# ---- folders, and tables of folder names


def test_folders_of_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    shard_well("folder", folder_of(tmp_path / "raw", FOLDERS), tmp_path / "out")
    assert classes(tmp_path / "out") == FOLDERS


def test_a_number_that_is_one_class_by_name_and_another_by_index_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard_well("folder", folder_of(tmp_path / "raw", FOLDERS), out)
    table = write_table(tmp_path / "test.csv", FOLDERS)
    error = shard("csv", table, out, split="test").error
    assert "'1' could be the class that is named '1', or the one with this index, which is '2'" in error
    shard_well("csv", table, out, "--labels", "names", split="test")
    assert label_names(out, "test") == names(tmp_path, FOLDERS)
    by_index = write_table(tmp_path / "dev.csv", TWELVE)
    shard_well("csv", by_index, out, "--labels", "indices", split="dev")
    assert label_names(out, "dev") == names(tmp_path, FOLDERS)


def test_names_as_pandas_writes_them_are_ambiguous_too(tmp_path: Path) -> None:
    """Folders 01 to 12, read as integers and written as 1 to 12."""
    out, padded = tmp_path / "out", [f"{number:02d}" for number in range(1, 13)]
    shard_well("folder", folder_of(tmp_path / "raw", padded), out)
    table = write_table(tmp_path / "test.csv", FOLDERS)
    assert "named '01'" in shard("csv", table, out, split="test").error
    shard_well("csv", table, out, "--labels", "names", split="test")
    assert label_names(out, "test") == names(tmp_path, padded)


def test_numbers_that_would_be_read_in_two_ways_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("5\n7\n")
    table = write_table(tmp_path / "train.csv", ["5", "0"])
    error = shard("csv", table, tmp_path / "out", "--classes", tmp_path / "names.txt").error
    assert "'5' can only be the name of a class, and '0' only an index" in error


def test_a_data_set_that_has_numbers_in_the_order_of_text_keeps_it(tmp_path: Path) -> None:
    """As older versions ordered them."""
    (tmp_path / "names.txt").write_text("\n".join(sorted(FOLDERS)))
    raw, out = folder_of(tmp_path / "raw", FOLDERS), tmp_path / "out"
    shard_well("folder", raw, out, "--classes", tmp_path / "names.txt")
    shard_well("folder", raw, out, split="test")
    assert "already complete" in shard_well("folder", raw, out)
    assert classes(out) == sorted(FOLDERS)
    for split in ("train", "test"):
        assert label_names(out, split) == {f"{name}/{n}": name for n, name in enumerate(FOLDERS)}


# ---- .cls and .json


def tar_of(path: Path, labels: Sequence[Any], extension: str) -> Path:
    members: list[Any] = []
    for number, label in enumerate(labels):
        members += [(f"{number}.png", image_bytes(number)), (f"{number}.{extension}", label.encode())]
    return write_tar(path, members)


ODD_JSON = {
    "1.7": "1.7",
    "true": "true",
    "1e999": "inf",
    "null": "no label",
    "[3]": "no label",
    "NaN": "nan",
    "-1": "-1",
}


@pytest.mark.parametrize("value", ODD_JSON)
def test_json_that_is_no_label_is_a_bad_sample(tmp_path: Path, value: str) -> None:
    texts = [f'{{"y": {text}}}' for text in ("3", "3.0", '"3"', '" 3 "', value)]
    tar, out = tar_of(tmp_path / "t.tar", texts, "json"), tmp_path / "out"
    assert "1 of 5 images" in shard("webdataset", tar, out, "--label-key", "y").error
    shard_well("webdataset", tar, out, "--label-key", "y", "--on-bad", "skip")
    assert label_names(out) == dict.fromkeys("0123", "3")
    assert ODD_JSON[value] in rejected(out)["4"].casefold()


def test_json_booleans_may_be_the_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("true\nfalse\n")
    tar = tar_of(tmp_path / "t.tar", ['{"y": true}', '{"y": "false"}'], "json")
    shard_well("webdataset", tar, tmp_path / "out", "--label-key", "y", "--classes", tmp_path / "names.txt")
    assert label_names(tmp_path / "out") == {"0": "true", "1": "false"}


@pytest.mark.parametrize("text", ["-1", "nan", "1.7", "true", "", "\udcff", "[" * 100_000])
@pytest.mark.parametrize("extension", ["cls", "json"])
def test_cls_and_json_follow_the_rule_of_tables(tmp_path: Path, text: str, extension: str) -> None:
    labels = [t if extension == "cls" else f'{{"y": {json.dumps(t)}}}' for t in ("2.0", text)]
    if text.startswith("["):
        labels[1] = text
    members = [("0.png", image_bytes(0)), ("1.png", image_bytes(1))]
    members += [(f"{n}.{extension}", label.encode("utf-8", "surrogateescape")) for n, label in enumerate(labels)]
    tar, options = write_tar(tmp_path / "t.tar", members), ("--label-key", "y") if extension == "json" else ()
    shard_well("webdataset", tar, tmp_path / "out", "--on-bad", "skip", *options)
    assert label_names(tmp_path / "out") == {"0": "2"}
    assert rejected(tmp_path / "out").keys() == {"1"}


def test_the_names_in_all_tars_are_the_classes(tmp_path: Path) -> None:
    for number, labels in enumerate((["dog", "cat"], ["eel", "cat\n"])):
        tar_of(tmp_path / f"t-{number}.tar", labels, "cls")
    shard_well("webdataset", tmp_path / "t-{0..1}.tar", tmp_path / "out")
    assert classes(tmp_path / "out") == ["cat", "dog", "eel"]
    assert label_names(tmp_path / "out") == {"t-0/0": "dog", "t-0/1": "cat", "t-1/0": "eel", "t-1/1": "cat"}
    assert nldist("verify", tmp_path / "out", "--workers", 0).code == 0


def test_tars_of_numbers_that_are_folder_names_are_refused_and_then_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard_well("folder", folder_of(tmp_path / "raw", FOLDERS), out)
    tar = tar_of(tmp_path / "t.tar", FOLDERS, "cls")
    assert "--labels names or --labels indices" in shard("webdataset", tar, out, split="test").error
    shard_well("webdataset", tar, out, "--labels", "names", split="test")
    assert label_names(out, "test") == names(tmp_path, FOLDERS)
    assert nldist("verify", out, "--workers", 0).code == 0
    assert "labels differ" in shard("webdataset", tar, out, "--labels", "indices", split="test").error


# ---- label sets


def test_label_sets_follow_the_rule_of_tables(tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard_well("folder", folder_of(tmp_path / "raw", FOLDERS), out)
    keys = label_names(out)

    def noise(name: str, label_of: dict[str, str], *options: str) -> Any:
        rows = "".join(f"{key}.png,{label_of[own]}\n" for key, own in keys.items())
        (tmp_path / f"{name}.csv").write_text("path,label\n" + rows)
        return nldist("noise", out, "--csv", tmp_path / f"{name}.csv", "--name", name, *options)

    same = {name: name for name in FOLDERS}
    assert "--labels names or --labels indices" in noise("none", same).error
    assert noise("names", same, "--labels", "names").code == 0
    assert (
        noise("indices", {name: f"{number}.0" for number, name in enumerate(FOLDERS)}, "--labels", "indices").code == 0
    )
    index = Index.open(out, "train")
    for name in ("names", "indices"):
        np.testing.assert_array_equal(index.labels(name), index.labels())
    done = noise("one", dict.fromkeys(FOLDERS, "12"))
    assert "11 of 12 classes have no label: '1', '2'" in done.out
    assert (
        "row 3 below the header: the label -1 is out of range"
        in noise("odd", same | {keys_at(keys, 2): "-1"}, "--labels", "names").error
    )


def keys_at(keys: dict[str, str], position: int) -> str:
    return list(keys.values())[position]
