"""Clothing1M as it is distributed, through the command, to what its configurations open."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from nldist.config.file import load_config
from nldist.data.index import Index
from nldist.passes.data import Data
from tests.conftest import REPOSITORY
from tests.data.command import Done, classes, label_names, nldist, rejected
from tests.data.published import CLOTHES, UNLABELLED, clothing1m, clothing_keys, jpeg, lines


def shard(raw: Path, out: Path, *options: object) -> Done:
    return nldist("shard", "clothing1m", raw, out, "--workers", 0, *options)


def sharded(raw: Path, out: Path, *options: object) -> str:
    done = shard(raw, out, *options)
    assert done.code == 0, done.err
    return done.out


def keys(split: str) -> list[str]:
    return [key.removesuffix(".jpg") for key in clothing_keys(split)]


def test_every_split_has_its_images_and_labels(tmp_path: Path) -> None:
    printed = sharded(clothing1m(tmp_path / "raw"), tmp_path / "out")
    assert classes(tmp_path / "out") == list(CLOTHES)
    clean = [*keys("clean_train"), *keys("val"), *keys("test")]
    names = {key: CLOTHES[row % 14] for row, key in enumerate(clean)}
    for split in ("clean_train", "val", "test"):
        assert label_names(tmp_path / "out", split) == {key: names[key] for key in keys(split)}
    noisy = {key: CLOTHES[row % 14] for row, key in enumerate(keys("train"))}
    assert label_names(tmp_path / "out", "train") == noisy
    assert f"1 of 13 images have no label in clean_label_kv.txt: '{UNLABELLED}'; left out" in printed
    assert nldist("verify", tmp_path / "out", "--workers", 0).code == 0


def test_images_with_both_labels_show_the_real_noise(tmp_path: Path) -> None:
    """The noisy label is the given one, so that a run on this split is measured against the clean ones."""
    printed = sharded(clothing1m(tmp_path / "raw"), tmp_path / "out")
    index = Index.open(tmp_path / "out", "both")
    clean = [*keys("clean_train"), *keys("val"), *keys("test")]
    row_of = {key: row for row, key in enumerate(clean) if row % 2 == 0}
    assert sorted(index.keys(range(len(index)))) == sorted(row_of)
    rows = [row_of[key] for key in index.keys(range(len(index)))]
    assert index.labels("clean").tolist() == [row % 14 for row in rows]
    assert index.labels().tolist() == [(row + (row % 4 == 0)) % 14 for row in rows]
    assert "label set clean: 10 of 20 given labels (50.00 %) differ from it" in printed
    assert "Down Coat" in printed.partition("label set clean")[2], "the matrix has the classes' names"


def test_a_label_set_that_a_kill_left_out_is_written_by_the_same_command(tmp_path: Path) -> None:
    raw, out = clothing1m(tmp_path / "raw"), tmp_path / "out"
    sharded(raw, out)
    before = (out / "both/labels/clean.parquet").read_bytes()
    shutil.rmtree(out / "both/labels")
    assert "already complete" in sharded(raw, out)
    assert (out / "both/labels/clean.parquet").read_bytes() == before


@pytest.mark.parametrize(("annotations", "images"), [("annotations", "images"), (".", "."), ("annotations", ".")])
def test_every_way_to_unpack_it_makes_the_same_bytes(tmp_path: Path, annotations: str, images: str) -> None:
    sharded(clothing1m(tmp_path / "plain"), tmp_path / "expected")
    sharded(clothing1m(tmp_path / "raw", annotations, images), tmp_path / "out")
    tars = sorted((tmp_path / "expected").rglob("*.tar"))
    assert len(tars) == 5
    for tar in tars:
        assert (tmp_path / "out" / tar.relative_to(tmp_path / "expected")).read_bytes() == tar.read_bytes()


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    sharded(raw, tmp_path / "one", "--shard-size", 20)
    done = nldist("shard", "clothing1m", raw, tmp_path / "two", "--shard-size", 20, "--workers", 2)
    assert done.code == 0, done.err
    for tar in (tmp_path / "one").rglob("*.tar"):
        assert (tmp_path / "two" / tar.relative_to(tmp_path / "one")).read_bytes() == tar.read_bytes()


def test_lists_of_windows_and_images_listed_again(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    listed = clothing_keys("val")
    lines(raw / "clean_val_key_list.txt", [*listed, "", listed[3], listed[3]], end="\r\n")
    printed = sharded(raw, tmp_path / "out")
    assert sorted(label_names(tmp_path / "out", "val")) == sorted(keys("val"))
    assert f"2 images are listed again in clean_val_key_list.txt and count once: '{listed[3]}'" in printed


def test_blanks_in_names_and_extensions_in_capitals(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    key = "images/9/99/1 7, 8.JPG"
    jpeg(raw / key)
    lines(raw / "clean_val_key_list.txt", [*clothing_keys("val"), key])
    with (raw / "clean_label_kv.txt").open("a") as file:
        file.write(f"{key}  13 \n")
    sharded(raw, tmp_path / "out")
    assert label_names(tmp_path / "out", "val")["images/9/99/1 7, 8"] == "Underwear"


def test_missing_and_broken_images_are_listed(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    gone, page, grey = (raw / key for key in clothing_keys("train")[:3])
    gone.unlink()
    page.write_text("<html>403 Forbidden</html>")
    data = jpeg(raw / "elsewhere.jpg").read_bytes()
    grey.write_bytes(data[: len(data) // 2])
    assert "3 of 40 images of" in shard(raw, tmp_path / "out").error
    assert "No such file or directory" in rejected(tmp_path / "out")[clothing_keys("train")[0]]
    printed = sharded(raw, tmp_path / "out", "--on-bad", "skip")
    assert "37 images in 1 shards, 3 left out" in printed
    assert rejected(tmp_path / "out").keys() == set(clothing_keys("train")[:3])


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (["noisy_label_kv.txt"], ["lacks noisy_label_kv.txt (there"]),
        (["clean_val_key_list.txt", "category_names_eng.txt"], ["lacks clean_val_key_list.txt, category_names"]),
        (["images"], ["lacks images/0 to images/9 (there are archives to unpack: '0.tar')"]),
        (["images/4"], ["raw lacks 1 of the 10 directories", "'images/4/24/'", "--on-bad skip"]),
    ],
)
def test_a_partial_directory_is_told_by_what_is_missing(tmp_path: Path, lost: list[str], words: list[str]) -> None:
    raw = clothing1m(tmp_path / "raw")
    (raw / "0.tar").touch()
    for name in lost:
        shutil.rmtree(raw / name) if (raw / name).is_dir() else (raw / name).unlink()
    error = shard(raw, tmp_path / "out").error
    for word in words:
        assert word in error
    if "directories" not in error:
        assert "it should hold images/0/00/A,B.jpg" in error
        assert not (tmp_path / "out").exists()


def test_another_directory_is_told_what_it_should_hold(tmp_path: Path) -> None:
    assert "is not a directory; it should hold images/0/00" in shard(tmp_path / "nowhere", tmp_path / "out").error
    error = shard(tmp_path, tmp_path / "out").error
    assert "lacks images/0 to images/9, clean_val_key_list.txt, " in error


def test_a_list_of_labels_that_is_cut_off_is_no_oversight(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    whole = (raw / "noisy_label_kv.txt").read_text().splitlines()
    lines(raw / "noisy_label_kv.txt", whole[:20])
    error = shard(raw, tmp_path / "out").error
    assert "20 of 40 images have no label in noisy_label_kv.txt" in error
    assert "whole?" in error


def test_a_label_that_is_no_class(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    lines(
        raw / "clean_label_kv.txt",
        [f"{key} 14" for split in ("clean_train", "val", "test") for key in clothing_keys(split)],
    )
    assert "there are 14 classes" in shard(raw, tmp_path / "out").error


@pytest.mark.parametrize("name", ["dividemix", "scanmix", "elr", "forward", "selc"])
def test_its_configurations_open_it(tmp_path: Path, name: str) -> None:
    sharded(clothing1m(tmp_path / "raw"), tmp_path / "out")
    config = load_config(REPOSITORY / f"configs/clothing1m/{name}.yaml", [f"data.root={tmp_path / 'out'}"])
    data = Data.open(config.data)
    assert (len(data.train), len(data.evaluation), data.train.num_classes) == (40, 14, 14)
    both = Data.open(config.data.model_copy(update={"train_split": "both"}))
    assert both.clean is not None
    assert (both.clean != both.labels).sum() == 10


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16"])
def test_what_only_bears_the_name_of_a_jpeg_is_written_as_what_it_is(tmp_path: Path, mode: str) -> None:
    raw = clothing1m(tmp_path / "raw")
    kind = {"L": "JPEG", "CMYK": "JPEG", "P": "GIF"}.get(mode, "PNG")
    for key in clothing_keys("val")[:2]:
        Image.new(mode, (9, 7)).save(raw / key, kind)
    sharded(raw, tmp_path / "out")
    assert sorted(label_names(tmp_path / "out", "val")) == sorted(keys("val"))
    assert nldist("verify", tmp_path / "out", "--workers", 0).code == 0


def test_a_label_file_that_names_an_image_twice(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    with (raw / "clean_label_kv.txt").open("a") as file:
        file.write(f"{clothing_keys('val')[0]} 0\n")
    printed = sharded(raw, tmp_path / "out")
    assert label_names(tmp_path / "out", "val")[keys("val")[0]] == CLOTHES[12]
    assert "1 images are listed again in clean_label_kv.txt and count once" in printed
    assert "1 of them with another label" in printed


@pytest.mark.parametrize("content", [b"", b"\n\r\n", b"images/\xff/1,2.jpg\n"])
def test_a_list_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    raw = clothing1m(tmp_path / "raw")
    (raw / "clean_val_key_list.txt").write_bytes(content)
    assert "clean_val_key_list.txt" in shard(raw, tmp_path / "out").error


def test_a_list_with_a_byte_order_mark_and_no_line_end(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    (raw / "clean_val_key_list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(clothing_keys("val")).encode())
    sharded(raw, tmp_path / "out")
    assert sorted(label_names(tmp_path / "out", "val")) == sorted(keys("val"))


def test_without_images_that_have_both_labels(tmp_path: Path) -> None:
    raw = clothing1m(tmp_path / "raw")
    lines(raw / "noisy_label_kv.txt", (raw / "noisy_label_kv.txt").read_text().splitlines()[:40])
    done = shard(raw, tmp_path / "out")
    assert "no image of the clean lists" in done.error
