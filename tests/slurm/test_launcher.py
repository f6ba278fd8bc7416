"""The launcher on two nodes: what a run survives, with the same end as one that was left alone."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nldist.cli.submit import main
from tests.commands import Command, Done
from tests.conftest import REPOSITORY, run_tool
from tests.jobs import run_job
from tests.mlflow_server import Server, client, points_in_lines, points_in_mlflow
from tests.slurm.cluster import Cluster
from tests.slurm.daemons import until
from tests.test_train import assert_same_weights, epoch_records

DIGITS = REPOSITORY / "tests" / "digits.yaml"
SETTINGS = ("train.epochs=4", "method.dividemix.warmup_epochs=1", "dist.device=cpu", "train.checkpoint_every_steps=5")
NODES = ("--nodes=2", "--tasks-per-node=1", "--cpus-per-task=1", "--time=0:10:00")


def launch(*arguments: object, env: dict[str, str], folder: Path, timeout: float = 300) -> Done:
    """launcher/submit.py in a process of its own, which prints into files in `folder`."""
    # A job inherits this environment, and so where the ranks find nldist.
    return Command(main, arguments, folder, env | {"PYTHONPATH": str(REPOSITORY)}).wait(timeout)


def submit(slurm: Cluster, digits: Path, run_dir: Path, *arguments: str) -> int:
    """The number of the one job that the launcher has queued."""
    (job,) = submit_all(slurm, digits, run_dir, *arguments)
    return int(job)


def submit_all(slurm: Cluster, digits: Path, run_dir: Path, *arguments: str) -> list[str]:
    """The names of the jobs that the launcher has queued."""
    settings = (f"data.root={digits}", f"run.dir={run_dir}", "track.every_seconds=0.001", *SETTINGS)
    done = launch(DIGITS, *settings, *NODES, *arguments, env=slurm.env, folder=run_dir.parent)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^job (\w+)", done.stdout, re.M)


def finish(slurm: Cluster, job: int, run_dir: Path) -> None:
    """Wait for the good end of a job, of which then nothing is left."""
    try:
        slurm.wait_for(job, "COMPLETED", timeout=240)
    except (RuntimeError, TimeoutError) as error:
        files = sorted((run_dir / "logs").glob("*_log.*"))
        logs = [f"{path.name}:\n{path.read_text()[-3000:]}" for path in files]
        raise AssertionError("\n".join([str(error), *logs])) from error
    until(lambda: not slurm.processes(job), "no process to be left", timeout=20)


@pytest.fixture(scope="module")
def undisturbed(slurm: Cluster, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Through `--wait`, which shows what rank 0 prints until the end."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    settings = (f"data.root={digits}", f"run.dir={run_dir}", "track.every_seconds=0.001", *SETTINGS)
    done = launch(DIGITS, *settings, *NODES, "--wait", env=slurm.env, folder=run_dir.parent)
    assert done.returncode == 0, done.stderr
    assert "epoch 4/4" in done.stdout
    return run_dir


def wait_for_step(run_dir: Path, place: str, num_steps: int) -> None:
    """Until the run is so far in a pass of the epoch whose line begins with `place`."""

    def there() -> bool:
        status = run_dir / "status.json"
        facts = json.loads(status.read_text()) if status.exists() else {}
        return bool(facts.get("place", "") >= place and facts.get("step", 0) >= num_steps)

    until(there, f"{run_dir} to come to step {num_steps} of {place}", timeout=180)


def test_two_nodes_learn_what_two_local_ranks_learn(
    slurm: Cluster, digits: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """(tests/launch has the local ranks that the launcher starts.)"""
    assert run_job(tmp_path / "run", f"data.root={digits}", *SETTINGS, world_size=2) == [0, 0]
    assert_same_weights(tmp_path / "run", undisturbed)
    assert epoch_records(tmp_path / "run") == epoch_records(undisturbed)
    facts = json.loads((undisturbed / "status.json").read_text())
    assert (facts["state"], facts["world_size"], facts["num_restarts"]) == ("done", 2, 0)
    assert slurm.job(facts["job"])["NodeList"] == "n[1-2]"
    logs = {path.name for path in (undisturbed / "logs").iterdir()}
    assert {f"{facts['job']}_{rank}_log.{kind}" for rank in (0, 1) for kind in ("out", "err")} <= logs


def preempt(slurm: Cluster, job: int) -> None:
    slurm.run("scancel", "--signal=USR2", job)


def preempt_really(slurm: Cluster, job: int) -> None:
    """By a job of a partition with a higher priority, as Slurm is set up at many places: SIGTERM first."""
    urgent = slurm.run(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )
    slurm.wait_for(urgent, "COMPLETED", timeout=90)


def requeue(slurm: Cluster, job: int) -> None:
    slurm.run("scontrol", "requeue", job)


def kill_rank(slurm: Cluster, job: int) -> None:
    os.kill(slurm.tasks(job)[1].pid, signal.SIGKILL)


def kill_node(slurm: Cluster, job: int) -> None:
    slurm.kill_node("n2")
    until(lambda: slurm.state(job) != "RUNNING", "Slurm to notice the lost node", timeout=90)
    slurm.start_node("n2")


@pytest.mark.parametrize(
    "disturb",
    [preempt, *(pytest.param(d, marks=pytest.mark.slow) for d in (kill_rank, preempt_really, requeue, kill_node))],
)
def test_a_disturbed_job_ends_as_if_left_alone(  # type: ignore[no-untyped-def]
    disturb, slurm: Cluster, digits: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(slurm, digits, run_dir)
    wait_for_step(run_dir, "epoch 2/4", 3)
    disturb(slurm, job)
    finish(slurm, job, run_dir)
    assert slurm.restarts(job) == 1
    assert_same_weights(undisturbed, run_dir)
    assert epoch_records(undisturbed) == epoch_records(run_dir)
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]


@pytest.mark.slow
def test_a_job_at_its_time_limit_goes_on_in_the_next(slurm: Cluster, digits: Path, tmp_path: Path) -> None:
    run_dir, settings = tmp_path / "run", tmp_path / "mine.yaml"
    settings.write_text("grace_seconds: 5\n")  # Slurm looks every 30 s and sends its signal up to so much earlier
    job = submit(slurm, digits, run_dir, "train.epochs=80", "--time=0:01:00", f"--cluster-file={settings}")
    slurm.wait_for(job, "COMPLETED", timeout=900)
    assert slurm.restarts(job) > 0
    assert "all saved" in (run_dir / "logs" / f"{job}_0_log.out").read_text()
    assert len(epoch_records(run_dir)) == 80
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]


@pytest.mark.slow
@pytest.mark.parametrize("member", [0, 1])
def test_a_preempted_member_of_an_array_is_started_again_alone(
    member: int, slurm: Cluster, digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    names = submit_all(slurm, digits, run_dir, "--array-seeds=0-1", "track.enabled=false")
    wait_for_step(run_dir / f"run.seed={member}", "epoch 2/4", 1)
    slurm.run("scancel", "--signal=USR2", names[member])
    for name in names:
        slurm.wait_for(name, "COMPLETED", timeout=240)
    assert [slurm.restarts(name) for name in names] == [int(member == 0), int(member == 1)]


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Cluster, digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(slurm, digits, run_dir)
    wait_for_step(run_dir, "epoch 2/4", 2)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    until(lambda: not slurm.processes(job), "no process to be left", timeout=30)
    time.sleep(2)
    assert (slurm.state(job), slurm.restarts(job)) == ("CANCELLED", 0)
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"


def test_an_error_of_the_user_is_not_tried_again(slurm: Cluster, digits: Path, tmp_path: Path) -> None:
    """Found only on the node: it has no GPU."""
    run_dir = tmp_path / "run"
    done = launch(
        DIGITS,
        f"data.root={digits}",
        f"run.dir={run_dir}",
        "dist.device=cuda",
        *NODES,
        "--wait",
        env=slurm.env,
        folder=tmp_path,
    )
    assert done.returncode == 1
    (job,) = set(re.findall(r"^job (\w+):", done.stdout, re.M))  # a line for each of its states
    assert f"job {job} ended: FAILED" in done.stderr
    assert slurm.restarts(job) == 0
    assert "error: " in (run_dir / "logs" / f"{job}_0_log.err").read_text()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte, for the checkpoints of a run."""
    disk = tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_space(
    slurm: Cluster, digits: Path, undisturbed: Path, small_disk: Path
) -> None:
    run_dir = small_disk.parent
    job = submit(slurm, digits, run_dir, "track.enabled=false")
    with pytest.raises(RuntimeError, match="FAILED"):
        slurm.wait_for(job, "COMPLETED", timeout=120)
    assert slurm.restarts(job) == 0
    assert "free some space" in (run_dir / "logs" / f"{job}_0_log.err").read_text()
    subprocess.run(["mount", "-o", "remount,size=200M", small_disk], check=True)
    job = submit(slurm, digits, run_dir, "track.enabled=false")
    finish(slurm, job, run_dir)
    assert_same_weights(undisturbed, run_dir)


@pytest.mark.slow
def test_an_mlflow_server_that_was_away_for_half_of_a_run_has_all_of_it(
    slurm: Cluster, digits: Path, undisturbed: Path, server: Server, tmp_path: Path
) -> None:
    """The server dies in the first epoch and is back in the third; in between the job is preempted and goes on."""
    run_dir = tmp_path / "run"
    server.start()
    job = submit(slurm, digits, run_dir, f"track.uri={server.uri}")
    wait_for_step(run_dir, "epoch 1/4", 3)
    server.kill()
    wait_for_step(run_dir, "epoch 2/4", 3)
    preempt(slurm, job)
    slurm.wait_for_restart(job, 1)
    wait_for_step(run_dir, "epoch 3/4", 3)
    server.start()
    finish(slurm, job, run_dir)
    assert_same_weights(undisturbed, run_dir)
    store = client(server.uri)
    (run,) = store.search_runs([experiment.experiment_id for experiment in store.search_experiments()])
    assert run.info.status == "FINISHED"
    assert points_in_mlflow(server.uri, run.info.run_id) == points_in_lines(run_dir)


@pytest.mark.slow
def test_the_demo_is_as_accurate_on_two_nodes_as_on_local_ranks(slurm: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    run_tool("tools/shard.py", "digits", data, "--name", "digits")
    run_tool("tools/noise.py", data, "--model", "symmetric", "--rate", 0.8, "--seed", 0, "--name", "sym80")
    runs = {}
    for cluster, nodes in (("slurm", NODES), ("local", ("--tasks-per-node=2",))):
        runs[cluster] = tmp_path / cluster / "run"
        settings = (
            f"data.root={data}",
            f"run.dir={runs[cluster]}",
            f"run.stages_dir={tmp_path / cluster}",
            "dist.device=cpu",
        )
        demo = REPOSITORY / "configs" / "demo.yaml"
        env = slurm.env | {"OMP_NUM_THREADS": "1"}
        done = launch(
            demo, *settings, f"--cluster={cluster}", *nodes, "--wait", env=env, folder=tmp_path / cluster, timeout=900
        )
        assert done.returncode == 0, done.stdout + done.stderr
    summaries = [json.loads((run_dir / "summary.json").read_text()) for run_dir in runs.values()]
    assert summaries[0]["method"] == "scanmix"
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"]
    assert_same_weights(*runs.values())


@pytest.mark.slow
def test_stages_are_jobs_that_wait_for_each_other(slurm: Cluster, digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ("method.name=scanmix", "train.eval_batch_size=128", "track.enabled=false")
    names = submit_all(slurm, digits, run_dir, *settings, "--array-seeds=0-1", "--stages")
    jobs = list(dict.fromkeys(name.partition("_")[0] for name in names))
    assert names == [f"{job}_{member}" for job in jobs for member in (0, 1)]
    for job, before in zip(jobs[1:], jobs, strict=False):
        assert slurm.job(f"{job}_1")["Dependency"].startswith(f"aftercorr:{before}_")
    for job in jobs:
        for member in (0, 1):
            slurm.wait_for(f"{job}_{member}", "COMPLETED", timeout=300)
    for seed in (0, 1):
        directory = run_dir / f"run.seed={seed}"
        assert json.loads((directory / "summary.json").read_text())["seed"] == seed
        assert "cluster: done before" in (run_dir / "logs" / f"{jobs[3]}_{seed}_0_log.out").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition=gpu"], "partition gpu does not exist; this cluster has test, urgent"),
        (["--constraint=gpu80"], "Slurm refused the job: "),
        (["data.root=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    arguments: list[str], words: str, slurm: Cluster, digits: Path, tmp_path: Path
) -> None:
    done = launch(
        DIGITS,
        f"data.root={digits}",
        f"run.dir={tmp_path / 'run'}",
        *SETTINGS,
        *arguments,
        env=slurm.env,
        folder=tmp_path,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert slurm.run("squeue", "--noheader") == ""


def test_the_file_for_sbatch_is_printed_and_nothing_queued(slurm: Cluster, digits: Path, tmp_path: Path) -> None:
    done = launch(
        DIGITS,
        f"data.root={digits}",
        f"run.dir={tmp_path / 'run'}",
        *NODES,
        "--dry-run",
        env=slurm.env,
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    script = tmp_path / "job.sh"
    script.write_text(done.stdout)
    slurm.run("sbatch", "--test-only", script)
    assert not (tmp_path / "run").exists()
    assert slurm.run("squeue", "--noheader") == ""
