"""The baselines as whole jobs: they learn, resume, train under DeepSpeed, and tell before what they would do."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from nldist.cli import main
from tests.golden.runs import RUNS
from tests.jobs import DIGITS, output, run_job
from tests.test_train import assert_same_weights, epoch_records, weights

KEEP = ("method.co_teaching.forget_rate=0.45", "method.co_teaching.gradual_epochs=2")
JOBS = {
    "elr": (),
    "co_teaching": KEEP,
    "co_teaching_plus": (*KEEP, "method.co_teaching_plus.warmup_epochs=4"),
    "forward": ("method.forward.estimate_epochs=4",),
    "pencil": (
        *("method.pencil.warmup_epochs=3", "method.pencil.correction_epochs=2"),
        *("method.pencil.label_lr=2000", "method.pencil.finetune_lr=0.04"),
    ),
    "m_correction": ("method.m_correction.warmup_epochs=4",),
}
BYTES = {"elr": 40, "co_teaching": 0, "co_teaching_plus": 0, "forward": 0, "pencil": 40, "m_correction": 12}


def settings(name: str, digits: Path) -> tuple[str, ...]:
    return (f"data.root={digits}", f"method.name={name}", "train.epochs=6", "train.batch_size=32", *JOBS[name])


def columns(run_dir: Path) -> dict[str, np.ndarray]:
    """Every per-sample column of the last checkpoint, by the name of its file."""
    newest = max((run_dir / "checkpoints").iterdir())
    return {path.name: np.load(path) for path in newest.rglob("*.npy")}


# Of the others the engine and the columns are these two's.
QUICK = ("co_teaching_plus", "pencil")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in JOBS])
def test_it_learns_and_killed_in_the_middle_of_an_epoch_it_ends_with_the_same(
    name: str, few_digits: Path, tmp_path: Path
) -> None:
    arguments = (*settings(name, few_digits), "train.batch_size=16", "train.checkpoint_every_steps=7")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_job(whole, *arguments, world_size=2) == [0, 0]
    step = 15 * 4 + 10  # in the epoch in which most have just begun their second phase
    assert run_job(cut, *arguments, world_size=2, kill=(1, step))[1] == -9
    assert run_job(cut, *arguments, world_size=2) == [0, 0]
    assert "resumed from" in output(cut)
    assert_same_weights(whole, cut)
    assert epoch_records(whole) == epoch_records(cut)
    found = columns(cut)
    for file, values in columns(whole).items():
        np.testing.assert_array_equal(found[file], values, err_msg=file)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["accuracy"]["final"] > 40, "half of the labels of 479 images are wrong"
    assert summary["split"]["auc"] > 0.7
    clean = pq.read_table(whole / "tables" / "samples.parquet")["clean_probability"].to_numpy()
    assert ((clean >= 0) & (clean <= 1)).all()


@pytest.mark.parametrize("name", JOBS)
def test_a_dry_run_tells_its_phases_and_its_state(name: str, digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dry-run", str(DIGITS), *settings(name, digits)]) == 0
    told = capsys.readouterr().out
    assert f"state       {BYTES[name]} bytes per sample" in told
    assert told.count("phase ") == {"pencil": 3, "forward": 2, "m_correction": 2}.get(name, 1)


def test_two_networks_in_one_step_learn_under_deepspeed_what_they_learn_under_ddp(
    few_digits: Path, tmp_path: Path
) -> None:
    arguments = (f"data.root={few_digits}", *RUNS["co_teaching_plus"], "train.epochs=2", "train.batch_size=64")
    zero = ("engine.name=deepspeed", "engine.zero_stage=1")
    assert run_job(tmp_path / "ddp", *arguments, world_size=2) == [0, 0]
    assert run_job(tmp_path / "zero", *arguments, *zero, world_size=2) == [0, 0]
    for network, same in zip(weights(tmp_path / "ddp"), weights(tmp_path / "zero"), strict=True):
        for key, value in network.items():
            torch.testing.assert_close(same[key], value, rtol=0, atol=1e-3)
