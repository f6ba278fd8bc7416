"""CIFAR-10N's and CIFAR-100N's files, as published, become label sets; their pickles are data, never code."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nldist.data.index import Index
from tests.data.command import nldist
from tests.data.test_labels import CIFAR10, keyed_dataset

ROWS = 10  # per batch; the real ones have 10,000
NAMES = {"worst": "worse_label", "aggre": "aggre_label", "rand1": "random_label1", "rand3": "random_label3"}


def published(clean: np.ndarray, num_classes: int = 10) -> dict[str, np.ndarray]:
    """The dictionary of arrays that the files hold, in CIFAR's order."""
    generator = np.random.default_rng(5)
    content = {"clean_label": clean.astype(np.int64)}
    for entry in ("aggre_label", "worse_label", "random_label1", "random_label2", "random_label3"):
        wrong = generator.random(len(clean)) < 0.4
        content[entry] = np.where(wrong, generator.integers(num_classes, size=len(clean)), content["clean_label"])
    return content


@pytest.fixture
def clean() -> np.ndarray:
    return np.random.default_rng(4).integers(10, size=5 * ROWS)


@pytest.fixture
def index(tmp_path: Path, clean: np.ndarray) -> Index:
    """CIFAR-10 with ten images a batch, in the random order of shards."""
    order = np.random.default_rng(3).permutation(5 * ROWS)
    keys = [f"data_batch_{row // ROWS + 1}/{row % ROWS:05d}" for row in order]
    return keyed_dataset(tmp_path / "set", keys, clean[order].astype(np.int32), CIFAR10)


def original(index: Index, labels: np.ndarray) -> np.ndarray:
    """Labels by id in CIFAR's order."""
    return labels[np.argsort(index.keys(range(len(index))))]


def save_ordered(folder: Path, content: dict[str, np.ndarray]) -> Path:
    """The authors' files for TensorFlow: labels in another order, and what that order is."""
    order = np.random.default_rng(2).permutation(5 * ROWS)
    folder.mkdir()
    file = folder / "CIFAR-10_human_ordered.npy"
    ordered = {name: list(labels[order]) for name, labels in content.items()}  # numpy's scalars, as in the real file
    np.save(file, ordered, allow_pickle=True)  # type: ignore[arg-type]
    np.save(folder.parent / "image_order_c10.npy", order)
    return file


@pytest.mark.parametrize("name", [*NAMES, "worse_label"])
def test_labels_of_the_pt_file(tmp_path: Path, index: Index, clean: np.ndarray, name: str) -> None:
    content = published(clean)
    torch.save(content, file := tmp_path / "CIFAR-10_human.pt")
    done = nldist("noise", index.root, "--human", file, "--name", name)
    assert done.code == 0, done.err
    expected = content[NAMES.get(name, name)]
    np.testing.assert_array_equal(original(index, index.labels(name)), expected)
    np.testing.assert_array_equal(original(index, index.labels("clean")), clean)
    assert f"{name}: {(expected != clean).sum()} of 50 labels" in done.out


def test_labels_of_the_npy_file_in_the_order_of_tensorflow(tmp_path: Path, index: Index, clean: np.ndarray) -> None:
    content = published(clean)
    file = save_ordered(tmp_path / "data", content)
    options = ("--human", file, "--name", "human", "--label-column", "worst")
    assert nldist("noise", index.root, *options).code == 0
    np.testing.assert_array_equal(original(index, index.labels("human")), content["worse_label"])
    (tmp_path / "image_order_c10.npy").unlink()
    error = nldist("noise", index.root, *options[:3], "other", *options[4:]).error
    assert "clean labels differ" in error
    assert "image_order_c10.npy" in error
    assert index.label_sets() == ["clean", "human"]


@pytest.mark.parametrize(("key", "word"), [("noisy_label", "noisy100"), ("noise_label", "noisy100")])
def test_cifar100(tmp_path: Path, key: str, word: str) -> None:
    clean = np.arange(100)
    keys = [f"train/{row:05d}" for row in clean[::-1]]
    index = keyed_dataset(tmp_path / "set", keys, clean[::-1].astype(np.int32), [f"class {n}" for n in range(100)])
    content = {"clean_label": clean, key: (clean + 1) % 100, "noisy_coarse_label": clean % 20}
    torch.save(content, file := tmp_path / "CIFAR-100_human.pt")
    assert nldist("noise", index.root, "--human", file, "--name", word).code == 0
    np.testing.assert_array_equal(original(index, index.labels(word)), (clean + 1) % 100)
    assert "for the classes" in nldist("noise", index.root, "--human", file, "--name", "noisy_coarse_label").error


def test_labels_that_the_file_does_not_have(tmp_path: Path, index: Index, clean: np.ndarray) -> None:
    torch.save(published(clean), file := tmp_path / "CIFAR-10_human.pt")
    error = nldist("noise", index.root, "--human", file, "--name", "mine").error
    assert "has no labels 'mine' for the classes; it has clean (clean_label), worst (worse_label), aggre" in error
    assert index.label_sets() == []


def test_files_about_another_data_set(tmp_path: Path, index: Index, clean: np.ndarray) -> None:
    torch.save(published(clean[:-1]), file := tmp_path / "short.pt")
    assert "is not about the 50 images" in nldist("noise", index.root, "--human", file, "--name", "worst").error
    torch.save(published(np.roll(clean, 1)), file := tmp_path / "rolled.pt")
    assert "clean labels differ" in nldist("noise", index.root, "--human", file, "--name", "worst").error
    torch.save(published(clean, 11) | {"worse_label": np.full(50, 10)}, file := tmp_path / "more.pt")
    assert "runs from 10 to 10" in nldist("noise", index.root, "--human", file, "--name", "worst").error


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("kind", ["pt", "npy"])
def test_a_file_that_would_run_something_is_refused(tmp_path: Path, index: Index, clean: np.ndarray, kind: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / f"CIFAR-10_human.{kind}"
    content: dict[str, Any] = {"first": _Call(os.system, f"touch {mark}"), **published(clean)}
    torch.save(content, file) if kind == "pt" else np.save(file, content, allow_pickle=True)  # type: ignore[arg-type]
    error = nldist("noise", index.root, "--human", file, "--name", "worst").error
    assert "it asks for" in error
    assert not mark.exists()


@pytest.mark.parametrize("name", ["CIFAR-10_human.pt", "CIFAR-10_human.npy"])
def test_a_damaged_file(tmp_path: Path, index: Index, clean: np.ndarray, name: str) -> None:
    file = tmp_path / name
    assert "is no file of CIFAR-10N" in nldist("noise", index.root, "--human", file, "--name", "worst").error
    np.save(file.open("wb"), published(clean), allow_pickle=True)  # type: ignore[arg-type]
    file.write_bytes(file.read_bytes()[:300])
    assert "is no file of CIFAR-10N" in nldist("noise", index.root, "--human", file, "--name", "worst").error
