"""A comparison as an array of jobs."""

import json
import os
import signal
from pathlib import Path

import pytest

from nldist.cli.compare import main
from tests.commands import Command
from tests.conftest import REPOSITORY
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import until
from tests.slurm.test_launcher import DIGITS, NODES


@pytest.mark.slow
def test_no_longer_followed_its_jobs_go_on_and_are_not_queued_again(
    slurm: Cluster, digits: Path, tmp_path: Path
) -> None:
    root = tmp_path / "study"
    settings = (f"data.root={digits}", f"run.dir={root}", "train.epochs=30", "dist.device=cpu", "track.enabled=false")
    arguments = (DIGITS, *settings, *NODES, "--methods=cross_entropy,mixup", "--seeds=2")
    env = slurm.env | {"PYTHONPATH": str(REPOSITORY)}
    first = Command(main, arguments, tmp_path / "first", env)
    until(lambda: (root / "cross_entropy-0" / "metrics.jsonl").exists(), "a run", timeout=120)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait().returncode == 130
    second = Command(main, arguments, tmp_path / "second", env).wait()
    assert second.returncode == 0, second.stderr
    assert "0 run(s) queued, 4 queued before" in second.stdout
    rows = json.loads((root / "table.json").read_text())
    assert [(row["method"], row["seeds"], row["world_size"]) for row in rows] == [
        ("cross_entropy", [0, 1], [2]),
        ("mixup", [0, 1], [2]),
    ]
    third = Command(main, arguments, tmp_path / "third", env).wait()
    assert "0 run(s) queued, 0 queued before" in third.stdout
    assert third.returncode == 0
