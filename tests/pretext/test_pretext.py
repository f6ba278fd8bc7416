"""Both methods as stages of real jobs, on two and three ranks."""

from pathlib import Path
from typing import Any

import pytest

from nldist.pretext.base import Pretext
from nldist.pretext.moco import MoCo
from nldist.pretext.simclr import SimCLR
from nldist.train.run_pass import run_pass
from tests.jobs import output, run_job
from tests.pretext.make import SETTINGS, context_of
from tests.test_train import assert_same_weights, epoch_records

JOB = (
    *SETTINGS,
    "pretext.optim.accumulate=2",
    "pretext.knn_every=2",
    "train.checkpoint_every_steps=3",
)
ONLY = ("--stages", "pretext")


def directory(run_dir: Path) -> Path:
    (path,) = (run_dir / "stages").glob("pretext-*")
    return path


@pytest.mark.parametrize(
    ("name", "world_size", "kills"),
    [
        # 12 steps of training in each epoch, 12 of the bank and 3 of the queries: the second kill is in the bank
        ("simclr", 2, ((1, 7), (0, 25))),
        # 8, 8 and 2 steps: the second kill is in the queries
        ("moco", 3, ((2, 5), (1, 21))),
    ],
)
def test_killed_and_resumed_ends_with_the_same_weights_and_measures(
    name: str, world_size: int, kills: tuple[tuple[int, int], ...], digits: Path, tmp_path: Path
) -> None:
    arguments = (f"data.root={digits}", *JOB, f"pretext.name={name}", *ONLY)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_job(whole, *arguments, world_size=world_size) == [0] * world_size
    for victim, num_steps in kills:
        codes = run_job(cut, *arguments, world_size=world_size, kill=(victim, num_steps))
        assert codes[victim] == -9
    assert run_job(cut, *arguments, world_size=world_size) == [0] * world_size
    assert output(cut).count("resumed from") == len(kills)
    resumed = [line.split()[2] for line in output(cut).splitlines() if line.startswith("resumed from")]
    trained = "e0001-p00-s000000012" if name == "simclr" else "e0001-p00-s000000008"
    assert resumed[-1].startswith(trained), "nothing is saved of the k-NN passes: they start again"
    assert_same_weights(directory(whole), directory(cut))
    records = epoch_records(directory(whole))
    assert ["knn_accuracy" in record for record in records] == [False, True]
    assert records == epoch_records(directory(cut))


def knn_accuracy(method: Pretext, epoch: int) -> dict[str, Any]:
    bank, query = method.evaluation(epoch)
    run_pass(method.context, bank)
    return run_pass(method.context, query)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("simclr", ("pretext.batch_size=256",)),
        ("moco", ("pretext.queue=1024", "pretext.momentum=0.99", "pretext.optim.lr=0.02")),
    ],
)
def test_training_makes_the_features_better(name: str, settings: tuple[str, ...], digits: Path) -> None:
    length = ("pretext.epochs=12", "pretext.knn_every=10", "pretext.dim=64", "run.seed=1")
    context = context_of(digits, name, *length, *settings)
    method: Pretext = {"simclr": SimCLR, "moco": MoCo}[name](context)
    random = knn_accuracy(method, 11)
    for epoch in range(12):
        assert len(method.evaluation(epoch)) == 2 * (epoch in (9, 11)), "every ten epochs, and the last"
        run_pass(context, method.train_pass(epoch))
    trained = knn_accuracy(method, 11)
    # By votes that are half wrong: right ones find the digits' class with a random network's features, too.
    assert trained["knn_accuracy"] > random["knn_accuracy"] + 1
