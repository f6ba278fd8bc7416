"""LEND on several ranks, and in whole runs."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from nldist.config.file import load_config
from nldist.data.index import Index
from nldist.dist.engine import Engine
from nldist.dist.world import World
from nldist.methods.lend import Lend, spread
from nldist.models import build
from nldist.train.dry_run import dry_run
from nldist.train.run_pass import run_pass
from tests.contexts import task_of
from tests.jobs import DIGITS, run_job
from tests.methods.test_lend import PROFILES, build_lend, clusters, settings_of
from tests.networks import Flat
from tests.ranks import run_ranks
from tests.test_train import assert_same_weights, epoch_records

# Several ranks


def spread_part(world: World, digits: Path, profile: str, bounds: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    method = build_lend(digits, f"method.lend.profile={profile}", "method.lend.graph=all_ranks", world=world)
    features, labels = (rows.float()[bounds[world.rank] : bounds[world.rank + 1]] for rows in clusters(61, 7))
    diluted, isolated = method.spread(features, labels)
    return diluted.numpy(), isolated.numpy()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_gathered_graph_is_the_concatenated_batch_s_to_the_bit(profile: str, digits: Path) -> None:
    ((diluted, isolated),) = run_ranks(spread_part, 1, digits, profile, (0, 61))
    for bounds in ((0, 40, 61), (0, 30, 31, 61)):
        parts = run_ranks(spread_part, len(bounds) - 1, digits, profile, bounds)
        assert np.array_equal(np.concatenate([rows for rows, _ in parts]), diluted)
        assert np.array_equal(np.concatenate([rows for _, rows in parts]), isolated)
    features, labels = clusters(61, 7)
    own, _ = spread(features[:40].float(), labels[:40].float(), settings_of(profile, k=3))
    assert not np.allclose(own, diluted[:40]), "a rank's own graph is another one"


class Linear(Flat):
    """Features without batch norm, whose statistics are each rank's own; in float64."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, self.num_features))

    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward_features(images.double())


class PreciseLend(Lend):
    def build_engines(self) -> list[Engine]:
        return [self.context.engine(0, nn.Module.double)]


def one_epoch(world: World, digits: Path, profile: str) -> np.ndarray:
    """All diluted labels after an epoch that is one step over all samples."""
    build.OWN_BACKBONES["linear"] = Linear  # type: ignore[assignment]
    settings = ("model.name=linear", f"train.batch_size={-(-1437 // world.size)}", "method.lend.graph=all_ranks")
    method = build_lend(digits, *settings, f"method.lend.profile={profile}", world=world, method=PreciseLend)
    run_pass(method.context, task_of(method, 0, "net0"))
    return method.diluted.gather()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_tables_are_the_same_on_any_number_of_ranks(profile: str, digits: Path) -> None:
    (alone,) = run_ranks(one_epoch, 1, digits, profile)
    assert len(np.unique(alone.argmax(1))) == 10
    for size in (2, 3):
        for diluted in run_ranks(one_epoch, size, digits, profile):
            np.testing.assert_allclose(diluted, alone, rtol=0, atol=1e-5)


def two_epochs_towards_uniform(world: World, digits: Path) -> tuple[np.ndarray, np.ndarray]:
    """All diluted labels where each dilution gives the uniform distribution; and the given labels."""
    method = build_lend(digits, "method.lend.profile=paper", "train.batch_size=100", world=world)
    method.spread = lambda features, labels: (torch.full_like(labels, 0.1), labels[:, 0] < 0)  # type: ignore[method-assign]
    for epoch in (0, 1):
        run_pass(method.context, task_of(method, epoch, "net0"))
    return method.diluted.gather(), method.context.labels


def test_every_row_is_updated_exactly_once_per_epoch(digits: Path) -> None:
    for size in (1, 2, 3):
        for diluted, labels in run_ranks(two_epochs_towards_uniform, size, digits):
            np.testing.assert_allclose(diluted, 0.81 * np.eye(10)[labels] + 0.19 * 0.1, rtol=1e-6)


# Whole runs


def tables(run_dir: Path) -> dict[str, bytes]:
    newest = max((run_dir / "checkpoints").iterdir())
    return {file.name: file.read_bytes() for file in newest.rglob("*.npy")}


@pytest.mark.parametrize(
    ("size", "profile", "kills"),
    [(2, "code", ((1, 11), (0, 6))), (3, "paper", ((2, 9),))],
)
def test_killed_within_an_epoch_and_resumed_it_ends_the_same(
    size: int, profile: str, kills: tuple[tuple[int, int], ...], few_digits: Path, tmp_path: Path
) -> None:
    arguments = [f"data.root={few_digits}", "method.name=lend", "train.epochs=3", "train.batch_size=32"]
    arguments += [f"method.lend.profile={profile}", "method.lend.history_from=1", "method.soft_dtype=float16"]
    arguments += ["method.lend.graph=all_ranks", "train.checkpoint_every_steps=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_job(whole, *arguments, world_size=size) == [0] * size
    for kill in kills:
        assert run_job(cut, *arguments, world_size=size, kill=kill)[kill[0]] == -9
    assert run_job(cut, *arguments, world_size=size) == [0] * size
    assert_same_weights(whole, cut)
    assert epoch_records(whole) == epoch_records(cut)
    assert len(tables(whole)) == 2 * size
    assert tables(whole) == tables(cut)
    assert pq.read_table(whole / "tables/samples.parquet") == pq.read_table(cut / "tables/samples.parquet")


def test_it_learns_from_labels_of_which_half_were_drawn_at_random(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_job(run_dir, f"data.root={digits}", "method.name=lend", "train.epochs=12") == [0]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["accuracy"]["final"] > 88
    assert summary["split"]["auc"] > 0.9
    truth, given = (Index.open(digits, "train").labels(name) for name in ("clean", "sym50"))
    table = pq.read_table(run_dir / "tables" / "samples.parquet").to_pydict()
    right = (np.array(table["suggested"]) == truth).mean()
    assert right > 0.75 > (given == truth).mean()
    assert epoch_records(run_dir)[-1]["diluted_accuracy"] == pytest.approx(100 * right)


def test_deepspeed_trains_it(digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={digits}", "method.name=lend", "train.epochs=1", "method.lend.graph=all_ranks")
    assert run_job(tmp_path / "ddp", *arguments, world_size=2) == [0, 0]
    zero = ("engine.name=deepspeed", "engine.zero_stage=1")
    assert run_job(tmp_path / "zero", *arguments, *zero, world_size=2) == [0, 0]
    (one,), (other,) = (epoch_records(tmp_path / name) for name in ("ddp", "zero"))
    assert other["net0/loss"] == pytest.approx(one["net0/loss"], rel=0.02)
    assert other["labelled_share"] == pytest.approx(one["labelled_share"], abs=0.02)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 41), ("float16", 21)])
def test_a_dry_run_says_what_it_keeps(dtype: str, size: int, digits: Path) -> None:
    settings = [f"data.root={digits}", "method.name=lend", f"method.soft_dtype={dtype}"]
    report = "\n".join(dry_run(load_config(DIGITS, settings), 2))
    assert f"state       {size} bytes per sample" in report
    assert "net0: 12 steps of 64 all images per rank" in report
