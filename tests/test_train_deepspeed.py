"""Whole jobs on DeepSpeed."""

import json
from pathlib import Path

import pytest
import torch

from nldist.train.evaluate import evaluate
from tests.jobs import output, run_job
from tests.test_train import assert_same_weights, epoch_records, weights

SHORT = (
    *("train.epochs=2", "method.dividemix.warmup_epochs=1"),
    *("train.batch_size=32", "train.checkpoint_every_steps=3"),
)


@pytest.mark.parametrize(("stage", "victim", "step"), [pytest.param(1, 1, 11, marks=pytest.mark.slow), (2, 0, 28)])
def test_killed_and_resumed_it_ends_with_the_same_plain_weights(
    stage: int, victim: int, step: int, few_digits: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = (f"data.root={few_digits}", *SHORT, "engine.name=deepspeed", f"engine.zero_stage={stage}")
    assert run_job(whole, *arguments, world_size=2) == [0, 0]
    assert run_job(cut, *arguments, world_size=2, kill=(victim, step))[victim] == -9
    assert run_job(cut, *arguments, world_size=2) == [0, 0]
    assert "resumed from" in output(cut)
    assert_same_weights(whole, cut)
    assert epoch_records(whole) == epoch_records(cut)
    for value in (value for network in weights(cut) for value in network.values()):
        assert value.untyped_storage().nbytes() == value.nbytes, "a tensor of its own, not a view into a larger one"
    summary = json.loads((cut / "summary.json").read_text())
    assert evaluate(cut)["accuracy"] == pytest.approx(summary["accuracy"]["final"], abs=0.3)


def test_it_goes_on_with_another_number_of_ranks_and_under_ddp(few_digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={few_digits}", *SHORT)
    zero = ("engine.name=deepspeed", "engine.zero_stage=1")
    assert run_job(tmp_path / "run", *arguments, *zero, world_size=2, kill=(0, 28))[0] == -9
    assert run_job(tmp_path / "run", *arguments) == [0]
    told = output(tmp_path / "run")
    assert "resumed from e0001-p00-s000000000 with 1 rank(s), written by 2" in told
    assert "DeepSpeed" not in told, "progress lines and nothing else"


@pytest.mark.slow
def test_scanmix_with_all_its_stages_learns_what_it_learns_under_ddp(digits: Path, tmp_path: Path) -> None:
    """A momentum encoder, a peer, parts that are frozen or left out, features of a layer: all read the weights."""
    arguments = [f"data.root={digits}", "method.name=scanmix", "train.epochs=2", "method.dividemix.warmup_epochs=1"]
    arguments += ["pretext.name=moco", "pretext.epochs=1", "cluster.epochs=1", "cluster.head_only=true"]
    assert run_job(tmp_path / "ddp", *arguments, world_size=2) == [0, 0]
    assert run_job(tmp_path / "zero", *arguments, "engine.name=deepspeed", "engine.zero_stage=2", world_size=2) == [
        0,
        0,
    ]
    for network, same in zip(weights(tmp_path / "ddp"), weights(tmp_path / "zero"), strict=True):
        for name, value in network.items():
            torch.testing.assert_close(same[name], value, rtol=0, atol=1e-3)
