"""Ends what is left of a test cluster once the process that started it is gone or closes the guardian's input."""

import shutil
import sys
from pathlib import Path

import psutil


def sweep(root: Path) -> None:
    """Kill the daemons and step daemons of the cluster in `root`, all processes of its jobs, and remove `root`."""
    while processes := _left_over(root):
        for process in processes:
            _kill(process)
        psutil.wait_procs(processes, timeout=5)
    shutil.rmtree(root, ignore_errors=True)


def _left_over(root: Path) -> list[psutil.Process]:
    others = (process for process in psutil.process_iter(["name"]) if process.pid != psutil.Process().pid)
    return [process for process in others if is_step_daemon(process, root) or _has_cluster(process, root)]


def _has_cluster(process: psutil.Process, root: Path) -> bool:
    """Whether it was started with this cluster in its environment: a daemon, a job's task, a command of a test."""
    try:
        running = process.status() != psutil.STATUS_ZOMBIE
        return bool(running and process.environ().get("SLURM_CONF") == str(root / "slurm.conf"))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def is_step_daemon(process: psutil.Process, spool: Path) -> bool:
    """Whether it is a `slurmstepd`, the parent of a step's tasks on a node, with its socket below `spool`."""
    try:
        if process.name() != "slurmstepd" or process.status() == psutil.STATUS_ZOMBIE:
            return False
        sockets = process.net_connections(kind="unix")
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return any(str(connection.laddr).startswith(f"{spool}/") for connection in sockets)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


if __name__ == "__main__":
    sys.stdin.read()
    sweep(Path(sys.argv[1]))
