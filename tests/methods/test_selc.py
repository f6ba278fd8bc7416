import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from nldist.config.file import load_config
from nldist.data.index import Index
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.methods.selc import SELC
from nldist.passes.supervised import Step
from nldist.train.dry_run import dry_run
from nldist.train.run_pass import run_pass
from tests.conftest import REPOSITORY, run_tool
from tests.contexts import open_context, task_of
from tests.jobs import DIGITS, run_job
from tests.ranks import run_ranks
from tests.tables import assert_same_tables, independent_of_the_batch, softmax
from tests.test_train import assert_same_weights

SETTINGS = ("method.name=selc", "train.epochs=6", "method.selc.turning_epoch=2")


def build(digits: Path, *overrides: str, world: World | None = None) -> SELC:
    return SELC(open_context(load_config(DIGITS, (f"data.root={digits}", *SETTINGS, *overrides)), world))


class Fixed:
    """An engine whose network gives these logits."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = torch.from_numpy(logits)

    def forward(self, *calls: Any) -> list[torch.Tensor]:
        return [self.logits]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_labels_move_before_they_are_learnt(momentum: float, dtype: str, digits: Path) -> None:
    """After k steps t = a^k y + (1-a) sum_j a^(k-j) p_j; L = - sum_c t_c log p_c; no log of 0 (our own reference)."""
    method = build(digits, f"method.selc.momentum={momentum}", f"method.soft_dtype={dtype}")
    rng, ids = np.random.default_rng(0), np.array([5, 900, 17])
    given = np.eye(10)[method.context.labels[ids]]
    steps = [rng.normal(size=(3, 10)) * 3 for _ in range(4)]
    steps[-1][0, 3] = 500.0  # where a float32 softmax is exactly 0 and 1
    for k in range(1, 5):
        labels = torch.from_numpy(method.context.labels[ids]).long()
        step = Step(torch.from_numpy(ids), labels, torch.zeros(3, 3, 8, 8), 2.5, rng)
        loss = method.loss(Fixed(steps[k - 1]), step)["loss"]  # type: ignore[arg-type]
        t = momentum**k * given
        for j in range(1, k + 1):
            t = t + (1 - momentum) * momentum ** (k - j) * softmax(steps[j - 1])
        tolerance = 1e-5 if dtype == "float32" else 2e-3
        np.testing.assert_allclose(method.soft[torch.from_numpy(ids)].numpy(), t, atol=tolerance)
        shifted = steps[k - 1] - steps[k - 1].max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        assert float(loss) == pytest.approx(float(-(t * log_p).sum(1).mean()), rel=10 * tolerance)
    others = np.setdiff1d(np.arange(1437), ids)
    np.testing.assert_array_equal(method.soft.rows.numpy()[others], np.eye(10)[method.context.labels[others]])


def an_epoch(world: World, digits: Path) -> tuple[np.ndarray, dict[str, Any], np.ndarray, np.ndarray]:
    """The soft labels after an epoch of a network whose outputs do not depend on the batch; what the method says."""
    method = build(digits, "optim.lr=1e-12", "train.batch_size=32", world=world)
    independent_of_the_batch(method)
    assert run_pass(method.context, task_of(method, 1, "net0")) == {}
    metrics = run_pass(method.context, task_of(method, 2, "net0"))
    verdicts = method.verdicts()
    assert verdicts is not None
    return method.soft.gather(), metrics, world.all_gather(verdicts.clean_probability), verdicts.suggested


def test_every_row_moves_exactly_once_in_an_epoch_on_any_number_of_ranks(digits: Path) -> None:
    ((soft, metrics, clean, suggested),) = run_ranks(an_epoch, 1, digits)
    context = build(digits).context
    given = np.eye(10)[context.labels]
    prediction = (soft - 0.9 * given) / 0.1
    assert prediction.min() > -1e-5
    np.testing.assert_allclose(prediction.sum(1), 1, atol=1e-4)
    assert (prediction[given == 1] < 0.99).all(), "none is as it was"
    np.testing.assert_array_equal(suggested, soft.argmax(1))
    np.testing.assert_allclose(clean, (soft / soft.sum(1, keepdims=True))[given == 1], rtol=1e-6)
    assert context.clean is not None
    assert metrics["soft_accuracy"] == pytest.approx(100 * (soft.argmax(1) == context.clean).mean())
    for size in (2, 3):
        for rank, (other, found, _, _) in enumerate(run_ranks(an_epoch, size, digits)):
            np.testing.assert_allclose(other, soft, atol=1e-6)
            assert found["soft_accuracy"] == metrics["soft_accuracy"]
            assert ("split_auc" in found) == (rank == 0)


def test_what_was_never_seen_has_no_verdict(digits: Path) -> None:
    method = build(digits)
    method.seen[torch.arange(100)] = torch.ones(100)
    verdicts = method.verdicts()
    assert verdicts is not None
    assert np.isnan(verdicts.clean_probability[100:]).all()
    assert (verdicts.clean_probability[:100] == 1).all()
    assert (verdicts.suggested[100:] == -1).all()


def on_a_subset(world: World, digits: Path) -> tuple[np.ndarray, np.ndarray, bool]:
    method = build(digits, "method.selc.subset=400", world=world)
    for epoch in (1, 2, 3):
        run_pass(method.context, task_of(method, epoch, "net0"))
    assert method.population is not None
    return method.population, method.seen.gather(), method.verdicts() is None


def test_a_subset_is_balanced_and_the_same_in_every_epoch_on_any_number_of_ranks(digits: Path) -> None:
    labels = build(digits).context.labels
    ((population, _, _),) = run_ranks(on_a_subset, 1, digits)
    assert np.bincount(labels[population]).tolist() == [40] * 10
    for size in (1, 2, 3):
        for other, seen, silent in run_ranks(on_a_subset, size, digits):
            np.testing.assert_array_equal(other, population)
            assert np.flatnonzero(seen).tolist() == population.tolist()
            assert silent, "the others are judged by the last sweep"


def test_what_cannot_be_is_refused(digits: Path) -> None:
    with pytest.raises(UserError, match=r"method.selc.subset=9 is too small: set 10 or more"):
        build(digits, "method.selc.subset=9")
    with pytest.raises(UserError, match=r"method.selc.turning_epoch=6 leaves none of train.epochs=6"):
        build(digits, "method.selc.turning_epoch=6")


def test_a_dry_run_tells_of_the_rows(digits: Path) -> None:
    config = load_config(DIGITS, (f"data.root={digits}", *SETTINGS, "method.soft_dtype=float16"))
    lines = list(dry_run(config, 2))
    assert any("state       21 bytes per sample" in line for line in lines)
    assert any("correct: 4 epochs" in line for line in lines)


def test_killed_and_resumed_it_ends_the_same_and_better_than_the_labels(digits: Path, tmp_path: Path) -> None:
    arguments = [f"data.root={digits}", "method.name=selc", "train.epochs=12", "method.selc.turning_epoch=4"]
    arguments += ["method.selc.momentum=0.7", "train.checkpoint_every_steps=5"]
    assert run_job(tmp_path / "whole", *arguments, world_size=2) == [0, 0]
    assert run_job(tmp_path / "cut", *arguments, world_size=2, kill=(1, 100))[1] == -9
    assert run_job(tmp_path / "cut", *arguments, world_size=2) == [0, 0]
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert_same_tables(tmp_path / "whole", tmp_path / "cut")
    context = build(digits).context
    samples = pq.read_table(tmp_path / "cut" / "tables" / "samples.parquet")
    assert (samples["suggested"].to_numpy() == context.clean).mean() > (context.labels == context.clean).mean() + 0.25


def test_selc_plus_is_a_second_run_on_the_corrected_labels(digits: Path, tmp_path: Path) -> None:
    """docs/selc.md: the table of verdicts becomes a label set, by key."""
    data = shutil.copytree(digits, tmp_path / "data")
    arguments = (f"data.root={data}", *SETTINGS, "method.selc.momentum=0")
    assert run_job(tmp_path / "run", *arguments) == [0]
    samples = pq.read_table(tmp_path / "run" / "tables" / "samples.parquet")
    pyarrow.csv.write_csv(samples, tmp_path / "corrected.csv")
    run_tool(
        *("tools/noise.py", data, "--csv", tmp_path / "corrected.csv", "--name", "selc"),
        *("--path-column", "key", "--label-column", "suggested"),
    )
    corrected = Index.open(data, "train").labels("selc")
    np.testing.assert_array_equal(corrected, samples["suggested"].to_numpy())
    assert (corrected != build(digits).context.labels).mean() > 0.2


@pytest.mark.parametrize(
    ("run", "es", "momentum", "lr", "weight_decay", "milestones", "epochs", "batch_size", "subset"),
    [
        ("cifar10/selc", 40, 0.9, 0.02, 1e-3, [40, 80], 200, 128, None),
        ("cifar100/selc", 30, 0.9, 0.02, 1e-3, [40, 80], 200, 128, None),
        ("animal10n/selc", 40, 0.9, 0.1, 1e-3, [50, 75], 100, 128, None),
        ("clothing1m/selc", 5, 0.8, 0.01, 1e-3, [10, 20], 40, 64, 128_000),
        ("webvision/mini-selc", 40, 0.9, 0.01, 5e-4, [40, 80], 100, 32, None),
    ],
)
def test_the_released_code_s_values(
    run: str,
    es: int,
    momentum: float,
    lr: float,
    weight_decay: float,
    milestones: list[int],
    epochs: int,
    batch_size: int,
    subset: int | None,
) -> None:
    config = load_config(REPOSITORY / "configs" / f"{run}.yaml")
    selc, optim = config.method.selc, config.optim
    assert (selc.turning_epoch, selc.momentum, selc.subset) == (es, momentum, subset)
    assert (optim.lr, optim.weight_decay, optim.milestones) == (lr, weight_decay, milestones)
    assert (config.train.epochs, config.train.batch_size) == (epochs, batch_size)
