"""Whole runs that find their newest checkpoint damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.dist.test_damage import cut, flip, lose
from tests.jobs import output, run_job

SHORT = ("method.name=cross_entropy", "train.epochs=2", "train.batch_size=32", "train.checkpoint_every_steps=3")


@pytest.fixture(scope="module")
def whole(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("damaged") / "whole"
    assert run_job(run_dir, f"data.root={few_digits}", *SHORT, world_size=2) == [0, 0]
    return run_dir


@pytest.mark.parametrize(
    ("file", "harm", "told"),
    [
        ("rank-00001.pt", cut, "rank 1: rank-00001.pt: "),
        ("rank-00001.pt", lose, "rank 1: rank-00001.pt: No such file or directory"),
        ("shared.pt", flip, "rank 0: shared.pt: another checksum"),
        ("shared.pt", cut, "rank 0: shared.pt: "),
    ],
)
def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    file: str, harm: Callable[[Path], None], told: str, whole: Path, few_digits: Path, tmp_path: Path
) -> None:
    settings, run_dir = (f"data.root={few_digits}", *SHORT), tmp_path / "run"
    assert run_job(run_dir, *settings, world_size=2, kill=(0, 8))[0] == -9
    older, newest = sorted(run_dir.glob("checkpoints/e*"))
    harm(newest / file)
    assert run_job(run_dir, *settings, world_size=2) == [0, 0]
    kept = run_dir / "checkpoints" / "damaged" / newest.name
    assert kept.is_dir()
    log = output(run_dir)
    assert f"checkpoint {newest.name} is damaged ({told}" in log
    assert f": left, and kept in {kept}" in log
    assert f"resumed from {older.name}" in log
    ends = [torch.load(path / "weights" / "last.pt", weights_only=True)["networks"][0] for path in (whole, run_dir)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
