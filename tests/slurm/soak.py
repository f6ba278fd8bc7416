"""Twenty disturbances at random moments, one run: what happened, and whether the run ends as if left alone.

    make soak            (as root, with Slurm installed: .ci/install)

A job on two nodes is preempted, requeued, loses a rank or a node, again and again, also while it starts, saves or
stops. At the end its weights and metrics must be those of an undisturbed run, bit for bit, in one MLflow run, with
no process left. Prints a line per disturbance; exit code 1 if anything is off.
"""

import argparse
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY, run_tool
from tests.slurm.cluster import ENDED, Cluster, why_not
from tests.slurm.daemons import until
from tests.slurm.test_launcher import NODES, kill_node, launch, preempt_really, requeue
from tests.test_train import assert_same_weights, epoch_records

SETTINGS = ("method.dividemix.warmup_epochs=2", "dist.device=cpu", "train.checkpoint_every_steps=7")


def kill_rank(slurm: Cluster, job: int) -> None:
    """SIGKILL for one of the ranks."""
    until(lambda: slurm.tasks(job), "a rank to run", timeout=30)
    os.kill(random.choice(slurm.tasks(job)).pid, signal.SIGKILL)


def preempt(slurm: Cluster, job: int) -> None:
    """SIGUSR2, which reaches ranks and no batch script that has not started them yet."""
    until(lambda: slurm.tasks(job), "a rank to run", timeout=30)
    slurm.run("scancel", "--signal=USR2", job)


DISTURBANCES: dict[str, Callable[[Cluster, int], None]] = {
    "SIGUSR2": preempt,
    "preemption by another job": preempt_really,
    "scontrol requeue": requeue,
    "SIGKILL of a rank": kill_rank,
    "node lost": kill_node,
}


@dataclass
class Event:
    """One disturbance, and what came of it."""

    number: int
    name: str
    after_seconds: float  # since the job's start
    back_seconds: float = 0.0  # until it ran again


def main() -> int:
    """Run the job under disturbances and compare it with an undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    random.seed(options.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as root, Cluster() as slurm:
        data = Path(root) / "data"
        run_tool("tools/shard.py", "digits", data)
        run_tool("tools/noise.py", data, "--model=symmetric", "--rate=0.5", "--seed=0", "--name=sym50")
        runs = {name: Path(root) / name / "run" for name in ("undisturbed", "disturbed")}
        alone = start(slurm, data, runs["undisturbed"], options.epochs)
        slurm.wait_for(alone, "COMPLETED", timeout=3600)
        job = start(slurm, data, runs["disturbed"], options.epochs)
        events = disturb(slurm, job, options.number)
        slurm.wait_for(job, "COMPLETED", timeout=3600)
        print(f"job {job}: {slurm.restarts(job)} restarts")
        if len(events) < options.number:
            print(f"error: the run was over after {len(events)} disturbances; give it more --epochs", file=sys.stderr)
            return 1
        return verify(slurm, job, runs, len(events))


def start(slurm: Cluster, data: Path, run_dir: Path, epochs: int) -> int:
    """Submit through the launcher; the job's number."""
    settings = (f"data.root={data}", f"run.dir={run_dir}", f"train.epochs={epochs}", *SETTINGS)
    file = data.parent / "cluster.yaml"
    file.write_text("max_crashes: 1000\n")
    config, options = REPOSITORY / "tests/digits.yaml", (*NODES, "--cluster-file", file)
    done = launch(config, *settings, *options, env=slurm.env, folder=run_dir.parent)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(next(line for line in done.stdout.splitlines() if line.startswith("job ")).split()[1].rstrip(":"))


def disturb(slurm: Cluster, job: int, number: int) -> list[Event]:
    """Disturb the job again and again, until it has ended or it was often enough."""
    events: list[Event] = []
    while len(events) < number and slurm.state(job) != "COMPLETED":
        slurm.wait_for(job, ("RUNNING", "COMPLETED"), timeout=300)
        event = Event(len(events) + 1, random.choice(list(DISTURBANCES)), round(random.uniform(0, 30), 1))
        time.sleep(event.after_seconds)
        if slurm.state(job) != "RUNNING":
            continue
        began, restarts = time.monotonic(), slurm.restarts(job)
        DISTURBANCES[event.name](slurm, job)
        until(lambda: back(slurm, job, restarts), f"job {job} to run again after {event.name}", timeout=300)  # noqa: B023
        event.back_seconds = time.monotonic() - began
        events.append(event)
        place = f"{event.after_seconds:5.1f} s after the start"
        print(f"{event.number:3}  {event.name:26}  {place}  runs again after {event.back_seconds:5.1f} s", flush=True)
    return events


def back(slurm: Cluster, job: int, restarts: int) -> bool:
    """Whether the job runs once more, or has ended."""
    state = slurm.state(job)
    return state in ENDED or (state == "RUNNING" and slurm.restarts(job) > restarts)


def verify(slurm: Cluster, job: int, runs: dict[str, Path], num_events: int) -> int:
    """Compare the runs, and look for what should not be there."""
    assert_same_weights(runs["undisturbed"], runs["disturbed"])
    assert epoch_records(runs["undisturbed"]) == epoch_records(runs["disturbed"])
    with sqlite3.connect(runs["disturbed"].parent / "mlflow.db") as store:
        mlflow = store.execute("select status from runs").fetchall()
    until(lambda: not slurm.processes(job), "no process to be left", timeout=60)
    left = subprocess.run(["pgrep", "-f", str(runs["disturbed"])], capture_output=True, text=True).stdout.split()
    print(f"{num_events} disturbances: same weights, same metrics; MLflow runs {mlflow}; processes left: {len(left)}")
    return int(mlflow != [("FINISHED",)] or bool(left))


if __name__ == "__main__":
    sys.exit(main())
