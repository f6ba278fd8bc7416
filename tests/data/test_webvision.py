"""WebVision and ILSVRC12 as they are distributed, through the command, to what their configurations open."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from nldist.config.file import load_config
from nldist.passes.data import Data
from tests.conftest import REPOSITORY
from tests.data.command import Done, classes, label_names, nldist, rejected
from tests.data.published import SYNSETS, jpeg, lines, webvision

NAMES = ["n01440764 tench", "n01443537 goldfish", "n02012849 crane", "n03126707 crane"]


def shard(raw: Path, out: Path, *options: object, layout: str = "webvision") -> Done:
    return nldist("shard", layout, raw, out, "--workers", 0, *options)


def sharded(raw: Path, out: Path, *options: object, layout: str = "webvision") -> str:
    done = shard(raw, out, *options, layout=layout)
    assert done.code == 0, done.err
    return done.out


def train_keys(parts: str, num_classes: int) -> dict[str, str]:
    return {
        f"{part}/q{label + 1:04d}/{part[0]}{image}": NAMES[label]
        for part in parts.split()
        for label in range(num_classes)
        for image in range(3)
    }


@pytest.mark.parametrize(
    ("options", "parts", "num_classes"),
    [
        ((), "google flickr", 4),
        (("--classes", 2, "--part", "google"), "google", 2),
        (("--part", "flickr"), "flickr", 4),
    ],
)
def test_parts_and_first_classes(tmp_path: Path, options: tuple, parts: str, num_classes: int) -> None:
    sharded(webvision(tmp_path / "raw"), tmp_path / "out", *options)
    assert classes(tmp_path / "out") == NAMES[:num_classes]
    assert label_names(tmp_path / "out") == train_keys(parts, num_classes)
    expected = {f"val{row:06d}": NAMES[row % 4] for row in range(1, 9) if row % 4 < num_classes}
    assert label_names(tmp_path / "out", "val") == expected
    assert nldist("verify", tmp_path / "out", "--workers", 0).code == 0


@pytest.mark.parametrize("val", ["val_images_resized", "val_images", "val", "val/val_images_256"])
@pytest.mark.parametrize("tree", [".", "train", "google_resized_256"])
def test_where_distributions_put_images(tmp_path: Path, val: str, tree: str) -> None:
    flickr = tree.replace("google", "flickr")
    raw = webvision(tmp_path / "raw", val=val, trees={"google": tree, "flickr": flickr})
    sharded(raw, tmp_path / "out")
    assert label_names(tmp_path / "out") == train_keys("google flickr", 4)
    assert len(label_names(tmp_path / "out", "val")) == 8


def test_images_listed_twice_count_once(tmp_path: Path) -> None:
    raw = webvision(tmp_path / "raw")
    file = raw / "info/train_filelist_google.txt"
    lines(file, [*file.read_text().splitlines(), "google/q0001/g0.jpg 0", "google/q0002/g1.jpg 3"], end="\r\n")
    printed = sharded(raw, tmp_path / "out", "--part", "google")
    assert label_names(tmp_path / "out") == train_keys("google", 4)
    assert "2 images are listed again in train_filelist_google.txt and count once: 'google/q0001/g0.jpg'" in printed
    assert "1 of them with another label, of which the first counts" in printed


def test_a_missing_directory_of_other_classes_is_no_matter(tmp_path: Path) -> None:
    raw = webvision(tmp_path / "raw")
    shutil.rmtree(raw / "google/q0004")
    error = shard(raw, tmp_path / "all").error
    assert "raw lacks 1 of the 8 directories that its lists name, such as 'google/q0004/'" in error
    sharded(raw, tmp_path / "out", "--classes", 3)
    assert len(label_names(tmp_path / "out")) == 18


def test_a_missing_directory_is_left_out_on_demand(tmp_path: Path) -> None:
    raw = webvision(tmp_path / "raw")
    shutil.rmtree(raw / "google/q0004")
    sharded(raw, tmp_path / "out", "--on-bad", "skip")
    assert rejected(tmp_path / "out").keys() == {f"google/q0004/g{image}.jpg" for image in range(3)}


@pytest.mark.parametrize(
    ("lost", "word"),
    [
        (
            "google",
            "google/ (not needed with --part flickr) (there are archives to unpack: 'google_resized_256.tar')",
        ),
        ("info", "raw lacks info/train_filelist_google.txt, info/train_filelist_flickr.txt, info/val_filelist.txt"),
        ("info/synsets.txt", "raw lacks info/synsets.txt"),
        ("val_images_256", "raw lacks the validation images (val_images_256, val_images_resized, val_images or val)"),
    ],
)
def test_a_partial_directory_is_told_by_what_is_missing(tmp_path: Path, lost: str, word: str) -> None:
    raw = webvision(tmp_path / "raw")
    (raw / "google_resized_256.tar").touch()
    shutil.rmtree(raw / lost) if (raw / lost).is_dir() else (raw / lost).unlink()
    assert word in shard(raw, tmp_path / "out").error
    assert not (tmp_path / "out").exists()


def test_only_the_chosen_part_must_be_there(tmp_path: Path) -> None:
    raw = webvision(tmp_path / "raw")
    shutil.rmtree(raw / "flickr")
    (raw / "info/train_filelist_flickr.txt").unlink()
    sharded(raw, tmp_path / "out", "--part", "google")


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_number_of_classes_that_there_is_not(tmp_path: Path, number: int) -> None:
    error = shard(webvision(tmp_path / "raw"), tmp_path / "out", "--classes", number).error
    assert "--classes must be from 2 to the 4" in error


# ILSVRC12


VALIDATION = {1: "n02012849", 2: "n01440764", 3: "n09999999", 4: "n03126707", 5: "n01443537", 6: "n01440764"}


def image_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def by_synset(root: Path) -> Path:
    for number, synset in VALIDATION.items():
        jpeg(root / "val" / synset / f"{image_name(number)}.JPEG", number)
    (root / "val/n01440764/.DS_Store").touch()
    return root


def flat(root: Path, folder: str) -> Path:
    for number in VALIDATION:
        jpeg(root / folder / f"{image_name(number)}.JPEG", number)
    return root


def kaggle(root: Path) -> Path:
    rows = [f"{image_name(number)},{synset} 1 2 3 4 {synset} 5 6 7 8" for number, synset in VALIDATION.items()]
    lines(root / "LOC_val_solution.csv", ["ImageId,PredictionString", *reversed(rows)])
    return flat(root, "ILSVRC/Data/CLS-LOC/val")


def development_kit(root: Path, folder: str = "ILSVRC2012_img_val") -> Path:
    """Its numbers of synsets are not in the order of WebVision's classes."""
    kit = root / "ILSVRC2012_devkit_t12/data"
    synsets = sorted(set(VALIDATION.values()), reverse=True)
    lines(kit / "ILSVRC2012_validation_ground_truth.txt", [str(1 + synsets.index(s)) for s in VALIDATION.values()])
    table = np.zeros(len(synsets), [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")])
    for row, synset in enumerate(synsets):
        table[row] = (row + 1, synset, "words", 0)
    scipy.io.savemat(kit / "meta.mat", {"synsets": table[:, None]})
    return flat(root, folder)


@pytest.mark.parametrize("write", [by_synset, kaggle, development_kit, lambda root: development_kit(root, ".")])
def test_ilsvrc12_gets_the_classes_of_the_data_set(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    out = tmp_path / "out"
    sharded(webvision(tmp_path / "raw"), out, "--classes", 3)
    printed = sharded(write(tmp_path / "imagenet"), out, layout="ilsvrc12")
    assert "2 images of other synsets were left out" in printed
    name_of = {name.split()[0]: name for name in NAMES[:3]}
    found = {key.rpartition("/")[2]: name for key, name in label_names(out, "ilsvrc12").items()}
    assert found == {image_name(n): name_of[synset] for n, synset in VALIDATION.items() if synset in name_of}
    assert nldist("verify", out, "--workers", 0).code == 0


def test_ilsvrc12_needs_the_data_set_first(tmp_path: Path) -> None:
    raw = by_synset(tmp_path / "imagenet")
    assert "nldist shard webvision" in shard(raw, tmp_path / "out", layout="ilsvrc12").error
    nldist("shard", "digits", tmp_path / "digits", "--workers", 0)
    assert "do not begin with synsets" in shard(raw, tmp_path / "digits", layout="ilsvrc12").error


def test_what_ilsvrc12_lacks_is_told(tmp_path: Path) -> None:
    out, raw = tmp_path / "out", tmp_path / "imagenet"
    sharded(webvision(tmp_path / "raw"), out)
    raw.mkdir()
    assert "imagenet lacks the validation images; it should hold" in shard(raw, out, layout="ilsvrc12").error
    flat(raw, "val")
    assert "the labels of the images; it should hold" in shard(raw, out, layout="ilsvrc12").error
    (development_kit(raw, "val") / "ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    assert "lacks meta.mat beside" in shard(raw, out, layout="ilsvrc12").error


def test_training_images_and_missing_synsets_are_no_validation_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sharded(webvision(tmp_path / "raw"), out)
    jpeg(tmp_path / "train/n01440764/n01440764_18.JPEG")
    assert "n01440764_18.JPEG is not named as validation" in shard(tmp_path / "train", out, layout="ilsvrc12").error
    raw = by_synset(tmp_path / "imagenet")
    shutil.rmtree(raw / "val/n01443537")
    assert "has no images of 1 synsets: 'n01443537'" in shard(raw, out, layout="ilsvrc12").error


def test_an_image_of_the_ground_truth_that_is_missing_is_listed(tmp_path: Path) -> None:
    out, raw = tmp_path / "out", kaggle(tmp_path / "imagenet")
    sharded(webvision(tmp_path / "raw"), out)
    (raw / "ILSVRC/Data/CLS-LOC/val" / f"{image_name(5)}.JPEG").unlink()
    assert "1 of 5 images of" in shard(raw, out, layout="ilsvrc12").error
    sharded(raw, out, "--on-bad", "skip", layout="ilsvrc12")
    assert rejected(out).keys() == {f"{image_name(5)}.JPEG"}


@pytest.mark.parametrize("name", ["mini-dividemix", "mini-scanmix", "mini-selc", "mini-lend"])
def test_their_configurations_open_them(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    sharded(webvision(tmp_path / "raw", SYNSETS), out, "--classes", 3, "--part", "google")
    sharded(by_synset(tmp_path / "imagenet"), out, layout="ilsvrc12")
    config = load_config(REPOSITORY / f"configs/webvision/{name}.yaml", [f"data.root={out}"])
    for split, count in ((config.data.eval_split, 6), ("ilsvrc12", 4)):
        data = Data.open(config.data.model_copy(update={"eval_split": split}))
        assert (len(data.train), len(data.evaluation), data.train.num_classes) == (9, count, 3)
