"""A data set written by an array of jobs has the bytes of one that one machine wrote, whatever happens to the jobs."""

import hashlib
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nldist.cli.submit import main
from tests.commands import Command, Done
from tests.conftest import REPOSITORY
from tests.data.command import nldist
from tests.data.conftest import write_folder
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import until
from tests.slurm.test_launcher import launch

OPTIONS = ("--split=train", "--shard-size=4", "--name=zoo")
CLUSTER = ("--cpus-per-task=1", "--time=0:10:00")


def submitted(slurm: Cluster, *words: object, folder: Path) -> list[str]:
    """The names of the jobs: the array's members, and the last one's."""
    done = launch("--shard", *words, *CLUSTER, env=slurm.env, folder=folder)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^job (\w+)", done.stdout, re.M)


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def wait_for_shards(out: Path, number: int) -> None:
    until(lambda: len(list(out.glob("*/.build/*.parquet"))) >= number, f"{number} shards of {out}", timeout=90)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take long enough for a disturbance, some of them broken."""
    root = write_folder(tmp_path_factory.mktemp("raw") / "raw", (40, 30, 30))
    pixels = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "slow.png")
    for number in range(60):
        (root / f"bee/slow{number}.png").write_bytes((root / "slow.png").read_bytes())
    (root / "slow.png").unlink()
    for number in (3, 4, 17):
        (root / f"cow/broken{number}.jpg").write_bytes(b"<html>not found</html>")
    return root


@pytest.fixture(scope="module")
def by_one(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one machine makes of it."""
    out = tmp_path_factory.mktemp("by_one") / "out"
    done = nldist("shard", "folder", raw, out, *OPTIONS, "--on-bad=skip", "--workers=0")
    assert done.code == 0, done.err
    return hashes(out)


def test_all_splits_have_the_bytes_of_one_machine(slurm: Cluster, tmp_path: Path) -> None:
    words = ("digits", tmp_path / "data", "--shard-size", 100, "--name", "digits")
    done = launch("--shard", *words, *CLUSTER, "--nodes=2", "--wait", env=slurm.env, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "task 1 of 2: " in done.stdout
    assert f"{tmp_path / 'data/train'}: 1,437 images in 15 shards, 0 left out, " in done.stdout
    assert re.search(r"^1,797 images, [\d.]+ s since they were queued, \d+ images/s$", done.stdout, re.M)
    assert nldist("shard", *words[:1], tmp_path / "one", *words[2:], "--workers=0").code == 0
    assert hashes(tmp_path / "data") == hashes(tmp_path / "one")
    again = launch("--shard", *words, *CLUSTER, "--nodes=2", env=slurm.env, folder=tmp_path)
    assert again.returncode == 0
    assert "already complete, 1,437 images in 15 shards" in again.stdout
    assert "job" not in again.stdout


def kill(slurm: Cluster, job: str) -> None:
    (task,) = slurm.tasks(int(slurm.job(job)["JobId"]))
    os.kill(task.pid, signal.SIGKILL)


def kill_worker(slurm: Cluster, job: str) -> None:
    """One of the processes that the task has started."""
    own = [process for process in slurm.processes(int(slurm.job(job)["JobId"])) if "spawn_main" in process.command]
    os.kill(own[-1].pid, signal.SIGKILL)


def preempt(slurm: Cluster, job: str) -> None:
    slurm.run("scancel", "--signal=USR2", job)


def requeue(slurm: Cluster, job: str) -> None:
    slurm.run("scontrol", "requeue", job)


@pytest.mark.parametrize(
    "disturb", [kill, *(pytest.param(d, marks=pytest.mark.slow) for d in (kill_worker, preempt, requeue))]
)
def test_a_task_that_was_killed_is_started_again_and_no_byte_is_another(
    disturb: Callable[[Cluster, str], None], slurm: Cluster, raw: Path, by_one: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    words = ("folder", raw, out, *OPTIONS, "--on-bad=skip", "--nodes=2", "--workers=2")
    first, second, last = submitted(slurm, *words, folder=tmp_path)
    wait_for_shards(out, 6)
    disturb(slurm, second)
    slurm.wait_for(last, "COMPLETED", timeout=240)
    assert (slurm.restarts(first), slurm.restarts(second)) == (0, 1)
    assert hashes(out) == by_one


def test_another_number_of_tasks_goes_on_with_what_cancelled_ones_have_left(
    slurm: Cluster, raw: Path, by_one: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    words = ("folder", raw, out, *OPTIONS, "--on-bad=skip")
    jobs = submitted(slurm, *words, "--nodes=2", folder=tmp_path)
    wait_for_shards(out, 6)
    refused = launch("--shard", *words, *CLUSTER, "--nodes=3", env=slurm.env, folder=tmp_path)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: job .* of an earlier start has not ended: wait, or scancel \d+ \d+\n", refused.stderr)
    assert "train is being written by another command" in nldist("shard", *words, "--workers=0").error
    slurm.run("scancel", jobs[0].partition("_")[0])
    for job in jobs:  # the last one is cancelled by Slurm, as it can never start
        slurm.wait_for(job, "CANCELLED", timeout=120)
    assert not (out / "dataset.json").exists()
    done_before = {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")}
    *tasks, last = submitted(slurm, *words, "--nodes=3", folder=tmp_path)
    assert len(tasks) == 3
    slurm.wait_for(last, "COMPLETED", timeout=240)
    assert hashes(out) == by_one
    kept = [path for path, time in done_before.items() if path.stat().st_mtime_ns == time]
    assert len(kept) >= 6 - 2  # a shard whose sidecar was not yet there is done again


def test_bad_images_are_told_at_the_end_and_left_out_without_writing_the_shards_again(
    slurm: Cluster, raw: Path, by_one: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    words = ("--shard", "folder", raw, out, *OPTIONS, *CLUSTER, "--nodes=2", "--wait")
    done = launch(*words, env=slurm.env, folder=tmp_path)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: 3 of 163 images of {out / 'train'} are bad (cow/broken")
    (ended,) = [line for line in done.stderr.splitlines() if " ended: " in line]
    assert re.fullmatch(rf"job \d+ ended: FAILED; see {tmp_path}/data-logs/\d+_0_log.err", ended)
    assert hashes(out)["rejected.jsonl"] == by_one["rejected.jsonl"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")}
    skipped = launch(*words, "--on-bad=skip", env=slurm.env, folder=tmp_path)
    assert skipped.returncode == 0, skipped.stderr
    assert "task" not in skipped.stdout
    assert {path: path.stat().st_mtime_ns for path in out.glob("train/*.tar")} == before
    assert hashes(out) == by_one


def test_a_task_that_fails_is_one_line_and_the_end(slurm: Cluster, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    words = ("--shard", "folder", raw, out, *OPTIONS, "--on-bad=skip", *CLUSTER, "--nodes=2", "--wait")
    command = Command(main, words, tmp_path / "log", slurm.env | {"PYTHONPATH": str(REPOSITORY)})
    wait_for_shards(out, 2)
    taken = out / "train" / f"train-{40:06d}.tar"  # the last shard
    taken.mkdir(exist_ok=True)
    done = command.wait()
    assert done.returncode == 1
    check_failure(done, taken)
    assert json.loads((tmp_path / "data-logs" / ".jobs.json").read_text())


def check_failure(done: Done, taken: Path) -> None:
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error == f"error: cannot write {taken}: Is a directory; what is done stays, so run again"
    ended = [line.partition(" ended: ")[2].partition(";")[0] for line in done.stderr.splitlines() if " ended: " in line]
    assert sorted(ended) == ["CANCELLED", "FAILED"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus-per-node=8"], "--gpus-per-node is for training; sharding takes --cpus-per-task"),
        (["--cluster=local"], "--shard makes jobs of a Slurm cluster; on this machine: nldist shard ... --workers N"),
        (["--partition=gpu"], "partition gpu does not exist"),
        (["--no-such"], "--no-such"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_written(
    words: list[str], message: str, slurm: Cluster, raw: Path, tmp_path: Path
) -> None:
    done = launch("--shard", "folder", raw, tmp_path / "data", *OPTIONS, *words, env=slurm.env, folder=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "data").exists()


def test_the_files_for_sbatch_are_printed_and_nothing_queued(slurm: Cluster, raw: Path, tmp_path: Path) -> None:
    words = ("--shard", "folder", raw, tmp_path / "data", *OPTIONS, *CLUSTER, "--nodes=2", "--dry-run")
    done = launch(*words, env=slurm.env, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    about, array, last = done.stdout.split("#!/bin/bash")
    assert about == f"# {tmp_path / 'data/train'}: 163 images\n"
    assert "#SBATCH --array=0-1%" in array
    assert "#SBATCH --nodes=1" in array
    assert "#SBATCH --dependency=afterok:JOB" in last
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash" + array)
    slurm.run("sbatch", "--test-only", script)
    assert not (tmp_path / "data").exists()
    assert slurm.run("squeue", "--noheader") == ""
