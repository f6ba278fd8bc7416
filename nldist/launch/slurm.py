"""Asking Slurm, through its own commands."""

import re
import shutil
import subprocess

from nldist.errors import UserError

FINAL_STATES = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)


def has_slurm() -> bool:
    """Whether this machine can queue jobs."""
    return shutil.which("sbatch") is not None and shutil.which("srun") is not None


def check_partition(name: str | None) -> None:
    """Refuse (UserError) a partition that does not exist."""
    known = sorted(set(_run("sinfo", "--all", "--noheader", "--format=%R").split()))
    for one in name.split(",") if name else ():
        if one not in known:
            raise UserError(f"partition {one} does not exist; this cluster has {', '.join(known)}")


def job_state(job: str) -> str:
    """The state of a job or of an array's element, such as PENDING, RUNNING or COMPLETED."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, check=False)
    if match := re.search(r"JobState=(\w+)", shown.stdout):
        return match[1]
    # Slurm forgets ended jobs after some minutes; its accounting does not.
    words = _run("sacct", "--noheader", "--allocations", "--format=State", "--jobs", job).split()
    return words[0].rstrip("+") if words else "UNKNOWN"


def is_queued(job: str) -> bool:
    """Whether a job waits or runs; one that neither the controller nor the accounting knows does not."""
    try:
        return job_state(job) not in {*FINAL_STATES, "UNKNOWN"}
    except UserError:  # there is no accounting
        return False


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"{command[0]} failed: {' '.join(error.stderr.split())}; is Slurm running? (--cluster local does without)"
        ) from None
