"""Animal-10N as images and as binary files, through the command, to what its configurations open."""

import json
from pathlib import Path

import numpy as np
import pytest

from nldist.config.file import load_config
from nldist.passes.data import Data
from tests.conftest import REPOSITORY
from tests.data.command import Done, classes, label_names, nldist
from tests.data.published import animal_batch, jpeg
from tests.data.test_writer import stock_samples

CLASSES = ["cat", "lynx", "wolf", "coyote", "cheetah", "jaguar", "chimpanzee", "orangutan", "hamster", "guinea pig"]


def shard(raw: Path, out: Path, *options: object) -> Done:
    return nldist("shard", "animal10n", raw, out, "--workers", 0, *options)


def images(raw: Path, train: str = "training", test: str = "testing") -> Path:
    for row in range(30):
        jpeg(raw / train / f"{row % 10}_{row * 37}.jpg", row, side=64)
    for row in range(10):
        jpeg(raw / test / f"{9 - row}_{row}.jpg", row, side=64)
    (raw / train / ".DS_Store").touch()
    return raw


@pytest.mark.parametrize("folders", [("training", "testing"), ("train", "test")])
def test_the_name_of_an_image_begins_with_its_label(tmp_path: Path, folders: tuple[str, str]) -> None:
    done = shard(images(tmp_path / "raw", *folders), tmp_path / "out")
    assert done.code == 0, done.err
    assert classes(tmp_path / "out") == CLASSES
    train = {f"{row % 10}_{row * 37}": CLASSES[row % 10] for row in range(30)}
    assert label_names(tmp_path / "out") == train
    assert label_names(tmp_path / "out", "test") == {f"{9 - row}_{row}": CLASSES[9 - row] for row in range(10)}


def test_binary_files_hold_the_same(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    labels = {"data_batch_1": [3, 9, 0], "data_batch_2": [1, 1], "test_batch": [8, 5]}
    pixels = {name: animal_batch(raw / f"{name}.bin", labels[name], seed) for seed, name in enumerate(labels)}
    done = shard(raw, tmp_path / "out")
    assert done.code == 0, done.err
    samples = [*stock_samples(tmp_path / "out"), *stock_samples(tmp_path / "out", "test")]
    assert len(samples) == 7
    for sample in samples:
        name, row = sample["__key__"].split("/")
        name = name.removesuffix("_bin")
        np.testing.assert_array_equal(np.asarray(sample["png"]), pixels[name][int(row)])
        assert sample["cls"] == labels[name][int(row)]
    sizes = {
        name: split["num_samples"]
        for name, split in json.loads((tmp_path / "out/dataset.json").read_text())["splits"].items()
    }
    assert sizes == {"train": 5, "test": 2}


def test_a_partial_directory_is_told_by_what_is_missing(tmp_path: Path) -> None:
    raw = images(tmp_path / "raw", test="elsewhere")
    (raw / "raw_image.zip").touch()
    error = shard(raw, tmp_path / "out").error
    assert (
        "raw lacks testing (there are archives to unpack: 'raw_image.zip'); it should hold training/0_1234.jpg" in error
    )
    (tmp_path / "binary").mkdir()
    animal_batch(tmp_path / "binary/data_batch_1.bin", [1], 0)
    assert "binary lacks test_batch.bin; it should hold" in shard(tmp_path / "binary", tmp_path / "out").error


def test_files_that_are_not_of_it_are_refused(tmp_path: Path) -> None:
    raw = images(tmp_path / "raw")
    (raw / "training/readme.txt").write_text("hello")
    assert "'readme.txt' do not begin with a label" in shard(raw, tmp_path / "out").error
    binary = tmp_path / "binary"
    binary.mkdir()
    animal_batch(binary / "data_batch_1.bin", [1, 12], 0)
    animal_batch(binary / "test_batch.bin", [1], 0)
    assert "data_batch_1.bin has a label above 9" in shard(binary, tmp_path / "other").error
    (binary / "data_batch_1.bin").write_bytes(bytes(30730))
    assert "data_batch_1.bin is no file of Animal-10N: 30,730 bytes" in shard(binary, tmp_path / "other").error


@pytest.mark.parametrize("name", ["selc", "mixnn", "cross_entropy"])
def test_its_configurations_open_it(tmp_path: Path, name: str) -> None:
    assert shard(images(tmp_path / "raw"), tmp_path / "out").code == 0
    data = Data.open(load_config(REPOSITORY / f"configs/animal10n/{name}.yaml", [f"data.root={tmp_path / 'out'}"]).data)
    assert (len(data.train), len(data.evaluation), data.train.classes) == (30, 10, CLASSES)
