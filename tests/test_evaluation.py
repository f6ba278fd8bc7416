"""Accuracy as the papers publish it: on validation and test images, of the networks together and of each alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nldist.config.file import load_config
from nldist.dist.checkpoint import Checkpoints
from nldist.dist.world import World
from nldist.methods.build import build_method
from nldist.passes.evaluate import EvaluationPass
from nldist.run.directory import RunDirectory
from nldist.train.evaluate import evaluate
from nldist.train.progress import Progress
from nldist.train.run_pass import run_pass
from tests.contexts import open_context
from tests.jobs import DIGITS, output, run_job
from tests.ranks import run_ranks
from tests.test_train import assert_same_weights, epoch_records

# The training images are the test split here: another one than that which chooses.
JOB = (
    *("train.epochs=5", "train.batch_size=32", "method.dividemix.warmup_epochs=2", "optim.lr=0.1"),
    *("train.best=each", "data.test_split=train"),
)
ALONE = ("dist.device=cpu", "dist.num_threads=1")


def saved(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / "weights" / "best.pt", weights_only=True)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def run_dir(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation") / "run"
    assert run_job(path, f"data.root={few_digits}", *JOB, world_size=2) == [0, 0]
    return path


def test_each_network_is_of_its_own_best_epoch_and_the_test_split_measures_them(run_dir: Path) -> None:
    records, summary = epoch_records(run_dir), json.loads((run_dir / "summary.json").read_text())
    names = ("accuracy0", "accuracy1")
    curves = [[record[name] for record in records] for name in names]
    assert saved(run_dir)["epoch"] == [max(n + 1 for n, value in enumerate(c) if value == max(c)) for c in curves]
    chosen = evaluate(run_dir, weights="best", overrides=ALONE)
    assert [chosen[name] for name in names] == pytest.approx([max(curve) for curve in curves], abs=0.3)
    # Labels of the training split, half of which are wrong: as given in the shards they are right.
    tested = evaluate(run_dir, "train", "best", overrides=ALONE)
    assert summary["test"]["split"] == "train"
    for name in ("accuracy", "accuracy_top5", *names):
        assert summary["test"]["chosen"][name] == pytest.approx(tested[name], abs=0.1)
    for name in ("accuracy", "accuracy_top5"):
        values = [record[f"test_{name}"] for record in records]
        assert summary["test"][name] == {
            "best": max(values),
            "last": pytest.approx(np.mean(values)),
            "final": values[-1],
        }
    values = [record["accuracy_top5"] for record in records]
    assert summary["accuracy_top5"]["best"] == max(values) >= summary["accuracy"]["best"]
    chosen_accuracy = summary["test"]["chosen"]["accuracy"]
    assert f"{chosen_accuracy:.2f} on train (weights/best.pt)," in output(run_dir).splitlines()[-1]


def test_killed_it_ends_with_the_same_choice(run_dir: Path, few_digits: Path, tmp_path: Path) -> None:
    arguments, again = (f"data.root={few_digits}", *JOB), tmp_path / "run"
    for victim, step in ((1, 28), (0, 45)):
        assert run_job(again, *arguments, world_size=2, kill=(victim, step))[victim] == -9
    assert run_job(again, *arguments, world_size=2) == [0, 0]
    assert saved(again)["epoch"] == saved(run_dir)["epoch"]
    for one, other in zip(saved(again)["networks"], saved(run_dir)["networks"], strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    summaries = [json.loads((path / "summary.json").read_text()) for path in (again, run_dir)]
    assert summaries[0]["test"] == summaries[1]["test"]


@pytest.mark.parametrize("best", ["each", "together"])
def test_what_the_best_weights_hold(best: str, digits: Path, tmp_path: Path) -> None:
    config = load_config(DIGITS, [f"data.root={digits}", f"run.dir={tmp_path}", f"train.best={best}", *ALONE])
    context = open_context(config)
    run = RunDirectory(tmp_path)
    run.claim(config)
    method = build_method(context)
    checkpoints = Checkpoints(tmp_path / "checkpoints", context.world, 2, "")
    progress = Progress(method, checkpoints, run, "train")
    # Accuracies after each epoch: of both networks together, of the first, of the second.
    epochs = [(50.0, 30.0, 20.0), (60.0, 40.0, 10.0), (40.0, 35.0, 25.0), (60.0, 10.0, 25.0), (55.0, 20.0, 20.0)]
    for epoch, values in enumerate(epochs, start=1):
        for engine in method.engines:
            torch.nn.init.constant_(engine.model.head.bias, float(epoch))  # type: ignore[arg-type,union-attr]
        metrics = dict(zip(("accuracy", "accuracy0", "accuracy1"), values, strict=True))
        progress.record["scores"].append(metrics["accuracy"])
        for name in ("accuracy0", "accuracy1"):
            progress.record["measured"].setdefault(name, []).append(metrics[name])
        progress.save_weights(epoch, metrics)
    run.close()
    # Of equal ones the later.
    expected = [2, 4] if best == "each" else [4, 4]
    assert [float(state["head.bias"][0]) for state in saved(tmp_path)["networks"]] == expected
    assert saved(tmp_path)["epoch"] == (expected if best == "each" else 4)


def measured(world: World, digits: Path, logits: torch.Tensor) -> dict[str, float]:
    """What the evaluation pass makes of given logits of several networks, (n, N, C) by id."""
    context = open_context(load_config(DIGITS, [f"data.root={digits}", "train.eval_batch_size=100"]), world)
    context.fixed_view = lambda batch: batch.ids  # type: ignore[method-assign]
    return run_pass(context, EvaluationPass(context, [own.__getitem__ for own in logits]))


@pytest.mark.parametrize("world_size", [1, 3])
def test_accuracies_against_numpy(world_size: int, digits: Path) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 360, 10)).astype(np.float32))
    found = run_ranks(measured, world_size, digits, logits)
    labels = open_context(load_config(DIGITS, [f"data.root={digits}"])).evaluation.label
    each, together = logits.numpy(), logits.sum(0).numpy()
    expected = {f"accuracy{n}": 100 * (own.argmax(1) == labels).mean() for n, own in enumerate(each)}
    expected |= {"accuracy": 100 * (together.argmax(1) == labels).mean(), "num_evaluated": 360}
    order = np.argsort(-together, axis=1)[:, :5]
    expected["accuracy_top5"] = 100 * (order == labels[:, None]).any(1).mean()
    for metrics in found:
        assert metrics == pytest.approx(expected)


def test_the_warm_up_of_a_subset_sees_so_many_images_of_each_class(digits: Path, tmp_path: Path) -> None:
    settings = (f"data.root={digits}", "train.epochs=2", "method.dividemix.warmup_epochs=1")
    assert run_job(tmp_path / "run", *settings, "method.dividemix.warmup_subset=640") == [0]
    context = open_context(load_config(DIGITS, [*settings, *ALONE, "method.dividemix.warmup_subset=640"]))
    (first, second) = build_method(context).phases()[0].passes(0)
    plans = [task.plan() for task in (first, second)]
    ids = [np.concatenate([plan.step(k)["all"].ids for k in range(plan.num_steps)]) for plan in plans]
    counts = [np.bincount(context.labels[own], minlength=10) for own in ids]
    assert all(set(own.tolist()) == {64} for own in counts)
    assert set(ids[0].tolist()) != set(ids[1].tolist()), "each network has its own"


def test_stopped_in_the_last_measurement_it_may_be_made_longer(digits: Path, tmp_path: Path) -> None:
    settings = (f"data.root={digits}", "method.name=cross_entropy", "optim.schedule=step", "data.test_split=train")
    # 23 steps of training, 1 of evaluation and 3 of the test; 3 of the closing sweep, and 3 of the test again.
    (code,) = run_job(tmp_path / "cut", *settings, "train.epochs=1", stop=(0, 31))
    assert code not in (0, 1, 2)
    assert "stopped at e0001-p00-s000000000" in output(tmp_path / "cut")
    for name in ("cut", "whole"):
        assert run_job(tmp_path / name, *settings, "train.epochs=3") == [0]
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")
    assert epoch_records(tmp_path / "cut") == epoch_records(tmp_path / "whole")


def test_accuracies_of_another_test_split_are_not_mixed_with_it(digits: Path, tmp_path: Path) -> None:
    config = load_config(DIGITS, [f"data.root={digits}", f"run.dir={tmp_path}", "data.test_split=train", *ALONE])
    context = open_context(config)
    checkpoints = Checkpoints(tmp_path / "checkpoints", context.world, 2, "")
    progress = Progress(build_method(context), checkpoints, RunDirectory(tmp_path), "train")
    progress.record |= {"test_split": "other", "measured": {"test_accuracy": [1.0], "accuracy_top5": [2.0]}}
    for value in (3.0, 4.0):
        progress.measure({"accuracy": 0.0, "test_accuracy": value, "accuracy_top5": value})
    assert progress.record["measured"] == {"test_accuracy": [3.0, 4.0], "accuracy_top5": [2.0, 3.0, 4.0]}
