"""The processes of a test cluster's jobs, found by their environment."""

from pathlib import Path
from typing import NamedTuple

import psutil


class JobProcess(NamedTuple):
    """One process of a job on this machine."""

    pid: int
    job_id: int
    node: str
    step: str  # "batch" for the batch script and what it started; else the step's number, "0" for the first srun
    rank: int  # SLURM_PROCID; 0 for the batch script
    is_task: bool  # started by slurmstepd itself: the batch shell, or the task of an srun step
    command: str


def job_processes(slurm_conf: Path) -> list[JobProcess]:
    """All processes of jobs of the cluster with this configuration file, children of tasks included."""
    found = (_job_process(process, slurm_conf) for process in psutil.process_iter())
    return [process for process in found if process is not None]


def _job_process(process: psutil.Process, slurm_conf: Path) -> JobProcess | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        env = process.environ()
        if env.get("SLURM_CONF") != str(slurm_conf) or "SLURMD_NODENAME" not in env:
            return None
        parent = process.parent()
        return JobProcess(
            pid=process.pid,
            job_id=int(env["SLURM_JOB_ID"]),
            node=env["SLURMD_NODENAME"],
            step=env.get("SLURM_STEP_ID", "batch"),
            rank=int(env["SLURM_PROCID"]),
            is_task=parent is not None and parent.name() == "slurmstepd",
            command=" ".join(process.cmdline()),
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
