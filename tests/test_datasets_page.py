"""The commands of docs/datasets.md on data sets made small; then every configuration opens what they wrote."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nldist.config import Config
from nldist.config.file import load_config
from nldist.data.index import Index
from nldist.passes.data import Data
from tests.conftest import REPOSITORY
from tests.data.command import nldist
from tests.data.published import clothing1m, jpeg, webvision
from tests.data.test_animal10n import images as animal10n
from tests.data.test_food101n import food101n
from tests.data.test_sources import write_cifar10, write_cifar100

SYNSETS = [f"n{number:08d} thing {number}, other name" for number in range(60)]
MADE = {"clothing1m", "webvision", "animal10n", "cifar10", "cifar100"}
CONFIGS = sorted(path for path in (REPOSITORY / "configs").rglob("*.yaml") if path.parent.name in MADE)


def human(file: Path, clean: list[int], num_classes: int) -> None:
    """The labels of CIFAR-10N or CIFAR-100N."""
    wrong = (np.array(clean) + 1) % num_classes
    names = ("noisy_label",) if num_classes == 100 else ("worse_label", "aggre_label")
    torch.save({"clean_label": np.array(clean), **dict.fromkeys(names, wrong)}, file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all data sets as distributed, in which the page's commands have been run."""
    place = tmp_path_factory.mktemp("datasets")
    raw = place / "raw"
    clothing1m(raw / "clothing1m")
    webvision(raw / "webvision", SYNSETS, per_class=1)
    for number, synset in enumerate(SYNSETS):
        jpeg(raw / f"imagenet/val/{synset.split()[0]}/ILSVRC2012_val_{number:08d}.JPEG", number)
    animal10n(raw / "animal10n")
    food101n(raw / "Food-101N_release", raw / "food-101")
    ten, hundred = write_cifar10(raw / "cifar-10-batches-py"), write_cifar100(raw / "cifar-100-python")
    human(raw / "CIFAR-10_human.pt", [y for n in range(1, 6) for y in ten[f"data_batch_{n}"][b"labels"]], 10)
    human(raw / "CIFAR-100_human.pt", hundred["train"][b"fine_labels"], 100)
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "docs/datasets.md").read_text(), re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in "".join(blocks).splitlines():
            python, tool, *words = shlex.split(line)
            assert python == "python"
            done = nldist(Path(tool).stem, *words)
            assert done.code == 0, (line, done.err)
    return place


def test_the_data_sets_are_whole(place: Path) -> None:
    sizes = {path.parent.name: path for path in (place / "data").glob("*/dataset.json")}
    assert sizes.keys() == {"clothing1m", "webvision50", "webvision", "animal10n", "food101n", "cifar10", "cifar100"}
    for name in sizes:
        done = nldist("verify", place / "data" / name, "--workers", 0)
        assert done.code == 0, done.out
    counts = {split: len(Index.open(place / "data/webvision50", split)) for split in ("train", "val", "ilsvrc12")}
    assert counts == {"train": 50, "val": 100, "ilsvrc12": 50}
    assert Index.open(place / "data/cifar10", "train").label_sets() == ["aggre", "clean", "worst"]
    assert Index.open(place / "data/cifar100", "train").label_sets() == ["clean", "noisy100"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_opens_its_data_set(place: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    config = load_config(path)
    if config.data.label_set is not None:  # noise that a model makes of the labels
        config = load_config(path, ["data.label_set=" + ("worst" if "cifar10/" in str(path) else "noisy100")])
    data = Data.open(config.data)
    assert data.train.classes == data.evaluation.classes
    assert len(data.train) > len(data.train.shards)


def small(config: Config) -> list[str]:
    """What makes a configuration a matter of seconds: sizes, numbers of epochs, the network; no other setting."""
    method, size = config.method, 2 * len(Index.open(config.data.root, config.data.train_split).classes)
    settings = ["model.name=small_cnn", "model.pretrained=null", "train.epochs=2", "data.num_workers=0"]
    settings += ["train.batch_size=8", "train.eval_batch_size=16", "optim.milestones=[1]", "train.autocast=off"]
    if config.optim.restart_epochs is not None:
        settings.append("optim.restart_epochs=1")
    epochs = ["dividemix.warmup_epochs", "mixnn.warmup_epochs", "mixnn.turning_epoch", "selc.turning_epoch"]
    epochs += ["co_teaching_plus.warmup_epochs", "forward.estimate_epochs", "pencil.warmup_epochs"]
    epochs += ["m_correction.warmup_epochs", "mixnn.update_every", "mixnn.refresh_epochs", "lend.history_from"]
    settings += [f"method.{name}=1" for name in epochs] + ["method.pencil.correction_epochs=0", "method.lend.k=2"]
    settings += [
        f"method.{section}.{name}={size}" for section, name in SUBSETS if getattr(getattr(method, section), name)
    ]
    if method.name == "scanmix":
        settings += ["method.scanmix.batch_size=8", "pretext.epochs=1", "pretext.batch_size=8", "pretext.queue=16"]
        settings += ["mine.k=2", "cluster.epochs=1", "cluster.batch_size=8", "pretext.optim.lr_rule_epochs=0"]
    views: list[tuple[str, Mapping[str, Any]]] = [
        ("views", config.views.by_name()),
        ("pretext", {"view": config.pretext and config.pretext.view}),
    ]
    views += [("cluster", {"view": config.cluster and config.cluster.view}), ("mine", {"view": config.mine.view})]
    for section, named in views:
        ops = {name: view for name, view in named.items() if view is not None and not isinstance(view, str)}
        settings += [f"{section}.{name}={json.dumps([smaller(op.model_dump()) for op in ops[name]])}" for name in ops]
    return settings


def smaller(op: dict[str, Any]) -> dict[str, Any]:
    """An operation of a view whose images have 224 or 227 pixels, for 32."""
    sizes = {256: 40, 224: 32, 227: 32, 75: 10}
    made = {name: sizes.get(value, value) if isinstance(value, int) else value for name, value in op.items()}
    return made | ({"cutout": [sizes.get(side, side) for side in op["cutout"]]} if op.get("cutout") else {})


SUBSETS = [("dividemix", "subset"), ("dividemix", "warmup_subset"), ("mixnn", "subset"), ("selc", "subset")]


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_two_epochs_of_every_configuration(place: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    labels = []
    if load_config(path).data.label_set is not None:
        labels.append("data.label_set=" + ("worst" if "cifar10/" in str(path) else "noisy100"))
    run_dir = place / "runs" / path.parent.name / path.stem
    settings = [*small(load_config(path)), *labels, f"run.dir={run_dir}", "run.stages_dir=null", "track.enabled=false"]
    for command in ("dry-run", "train"):
        done = nldist(command, path, *settings, "dist.device=cpu", "dist.num_threads=1")
        assert done.code == 0, done.err
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["accuracy"]["best"] >= 0
    assert (summary.get("test") is not None) == (path.parent.name == "clothing1m")
    assert torch.load(run_dir / "weights" / "best.pt", weights_only=True)["classes"]
