"""The test cluster itself behaves as a Slurm cluster does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import submitit
import torch
import torch.distributed
from submitit.helpers import TorchDistributedEnvironment

from tests.slurm.cluster import REPOSITORY, Cluster
from tests.slurm.daemons import until

TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2")


def batch_script(directory: Path, *lines: str) -> Path:
    """A bash script that runs in `directory`, and stops at the first command that fails."""
    script = directory / "job.sh"
    head = ("#!/bin/bash", f"#SBATCH --chdir={directory}", "#SBATCH --output=job.out", "set -e")
    script.write_text("\n".join((*head, *lines)) + "\n")
    return script


def variables(text: str) -> dict[str, str]:
    """What `env` printed, by name."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_both_nodes_are_idle_and_only_the_environment_leads_there(slurm: Cluster) -> None:
    assert {node: slurm.node_state(node) for node in ("n1", "n2")} == {"n1": "idle", "n2": "idle"}
    assert "SLURM_CONF" not in os.environ


def test_srun_starts_tasks_on_both_nodes(slurm: Cluster) -> None:
    output = slurm.run("srun", *TWO_BY_TWO, "bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME")
    assert sorted(output.splitlines()) == ["0 n1", "1 n1", "2 n2", "3 n2"]


def test_accounting_knows_a_job_and_its_step(slurm: Cluster, tmp_path: Path) -> None:
    job_id = slurm.submit(batch_script(tmp_path, "srun true", "exit 3"), *TWO_BY_TWO)
    slurm.wait_for(job_id, "FAILED")
    assert slurm.job(job_id)["ExitCode"] == "3:0"
    job = (f"{job_id}", "job.sh", "FAILED", "3:0", "n[1-2]")
    batch = (f"{job_id}.batch", "batch", "FAILED", "3:0", "n1")
    step = (f"{job_id}.0", "true", "COMPLETED", "0:0", "n[1-2]")
    until(lambda: _rows(slurm, job_id) == [job, batch, step], "accounting to be complete", timeout=30)


def _rows(slurm: Cluster, job_id: int) -> list[tuple[str, ...]]:
    names = ("JobID", "JobName", "State", "ExitCode", "NodeList")
    return [tuple(row[name] for name in names) for row in slurm.history(job_id)]


@pytest.mark.slow
def test_a_requeued_job_starts_again_and_counts(slurm: Cluster, tmp_path: Path) -> None:
    script = batch_script(
        tmp_path, "echo start ${SLURM_RESTART_COUNT-none} >> starts", "test $SLURM_RESTART_COUNT || sleep 600"
    )
    job_id = slurm.submit(script, *TWO_BY_TWO)
    until((tmp_path / "starts").exists, "the job's first start", timeout=30)
    slurm.run("scontrol", "requeue", job_id)
    slurm.wait_for_restart(job_id, 1)
    slurm.wait_for(job_id, "COMPLETED")
    assert (tmp_path / "starts").read_text().splitlines() == ["start none", "start 1"]
    expected = ["REQUEUED", "COMPLETED"]
    until(lambda: _states(slurm, job_id) == expected, "accounting to know both starts", timeout=30)


def _states(slurm: Cluster, job_id: int) -> list[str]:
    return [row["State"] for row in slurm.history(job_id) if row["JobID"] == str(job_id)]


@pytest.mark.slow
def test_a_job_whose_node_dies_is_requeued_and_runs_when_the_node_is_back(slurm: Cluster, tmp_path: Path) -> None:
    task = "srun bash -c 'echo $SLURMD_NODENAME >> starts; test $SLURM_RESTART_COUNT || sleep 600'"
    job_id = slurm.submit(batch_script(tmp_path, task), "--nodes=2", "--ntasks-per-node=1")
    until(lambda: len(slurm.tasks(job_id)) == 2, "both tasks to run", timeout=30)
    slurm.kill_node("n2")
    assert {process.node for process in slurm.processes(job_id)} == {"n1"}
    until(lambda: slurm.restarts(job_id) == 1, "the job to be requeued", timeout=90)
    assert slurm.node_state("n2").startswith("down")
    slurm.start_node("n2")
    slurm.wait_for_restart(job_id, 1)
    slurm.wait_for(job_id, "COMPLETED")
    assert sorted((tmp_path / "starts").read_text().split()) == ["n1", "n1", "n2", "n2"]
    assert slurm.processes(job_id) == []


@pytest.mark.slow
def test_a_killed_rank_ends_the_step_while_the_batch_script_goes_on(slurm: Cluster, tmp_path: Path) -> None:
    lines = ("srun --kill-on-bad-exit=0 --wait=2 sleep 600 || code=$?", "echo $code > code")
    job_id = slurm.submit(batch_script(tmp_path, *lines), *TWO_BY_TWO)
    until(lambda: len(slurm.tasks(job_id)) == 4, "all tasks to run", timeout=30)
    os.kill(slurm.tasks(job_id)[2].pid, signal.SIGKILL)
    slurm.wait_for(job_id, "COMPLETED")
    assert (tmp_path / "code").read_text() == "137\n"
    assert slurm.processes(job_id) == []


@pytest.mark.slow
def test_variables_that_tell_a_task_from_the_batch_script(slurm: Cluster, tmp_path: Path) -> None:
    script = batch_script(tmp_path, "env > batch.env", "srun bash -c 'env > $SLURM_PROCID.env'")
    slurm.wait_for(slurm.submit(script, *TWO_BY_TWO), "COMPLETED")
    batch, task = (variables((tmp_path / name).read_text()) for name in ("batch.env", "3.env"))
    # The batch script looks like rank 0 of its own: only the step's variables are a task's alone.
    assert {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_NODELIST"} <= batch.keys()
    assert (batch["SLURM_PROCID"], batch["SLURM_LOCALID"], batch["SLURM_NTASKS"]) == ("0", "0", "4")
    assert batch.keys().isdisjoint({"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"})
    assert (task["SLURM_STEP_ID"], task["SLURM_PROCID"], task["SLURM_LOCALID"]) == ("0", "3", "1")
    assert (task["SLURM_STEP_NUM_TASKS"], task["SLURM_NODEID"], task["SLURMD_NODENAME"]) == ("4", "1", "n2")
    assert "SLURM_RESTART_COUNT" not in batch.keys() | task.keys()


def sum_of_ranks() -> tuple[int, int, str]:
    """The rank, the sum of all ranks through gloo, and what the set-up line of the batch script has left."""
    world = TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(world.rank)
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    return world.rank, int(total), os.environ["SET_UP"]


@pytest.mark.slow
def test_submitit_runs_ranks_that_meet(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    monkeypatch.chdir(REPOSITORY)
    executor = submitit.SlurmExecutor(folder=tmp_path)
    executor.update_parameters(
        nodes=2,
        ntasks_per_node=2,
        cpus_per_task=1,
        time=30,
        setup=["export SET_UP=done"],
        srun_args=["--kill-on-bad-exit=0", "--wait=60"],
        additional_parameters={"comment": "sum"},
    )
    job = executor.submit(sum_of_ranks)
    assert job.results() == [(rank, 6, "done") for rank in range(4)]
    slurm.wait_for(job.job_id, "COMPLETED")
    assert slurm.job(job.job_id)["Comment"] == "sum"


ABANDONED = """
import sys, time
from tests.slurm.cluster import Cluster
cluster = Cluster()
job_id = cluster.submit(sys.argv[1], "--nodes=2")
cluster.wait_for(job_id, "RUNNING")
print(cluster.root, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_nothing_is_left_of_a_cluster_whose_process_is_killed(slurm: Cluster, tmp_path: Path) -> None:
    script = batch_script(tmp_path, "srun sleep 600")
    owner = subprocess.Popen(
        [sys.executable, "-c", ABANDONED, str(script)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    root = owner.stdout.readline().strip()
    assert Path(root).is_dir()
    owner.kill()
    owner.communicate()
    until(lambda: not Path(root).exists(), "the directory to be removed", timeout=30)
    assert [process for process in psutil.process_iter() if root in _traces(process)] == []


def _traces(process: psutil.Process) -> str:
    try:
        return f"{process.cmdline()} {process.environ()}"
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
