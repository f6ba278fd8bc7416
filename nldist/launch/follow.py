"""Following queued jobs: rank 0's output as it comes, until all have ended."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import submitit
from submitit.local.local import LocalJob

from nldist.dist.stop import EXIT_STOPPED
from nldist.launch.slurm import FINAL_STATES, job_state

STOPPED = "STOPPED"
ENDED = FINAL_STATES | {STOPPED}
_POLL_SECONDS = 0.5
_STATE_SECONDS = 3.0
Job = submitit.Job[int]


def wait(jobs: Sequence[Job]) -> int:
    """Print what rank 0 of every job prints, until all have ended; returns 0 if all did what they should, else 1.

    Of jobs on this machine that stopped with all saved it returns 143, as `nldist train` would.

    Ctrl-C stops jobs on this machine, which save first; jobs on a cluster go on.
    """
    files = [_Tail(path, stream) for job in jobs for path, stream in _outputs(job)]
    states = dict.fromkeys((job.job_id for job in jobs), "PENDING")
    asked = 0.0
    while set(states.values()) - ENDED:
        try:
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - asked > (_STATE_SECONDS if not isinstance(jobs[0], LocalJob) else 0):
                states, asked = _states(jobs, states), time.monotonic()
        except KeyboardInterrupt:
            if not _interrupt(jobs):
                return 130
        for file in files:
            file.show()
    bad = {job: state for job, state in states.items() if state != "COMPLETED"}
    logs = {job.job_id: job.paths.stderr for job in jobs}
    for job, state in bad.items():
        print(f"job {job} ended: {state}; see {logs[job]}", file=sys.stderr)
    if bad and set(bad.values()) == {STOPPED}:
        return EXIT_STOPPED
    return 1 if bad else 0


def _outputs(job: Job) -> list[tuple[Path, TextIO]]:
    return [(job.paths.stdout, sys.stdout), (job.paths.stderr, sys.stderr)]


def _states(jobs: Sequence[Job], before: dict[str, str]) -> dict[str, str]:
    now = {}
    for job in jobs:
        state = before[job.job_id]
        if state not in ENDED:
            state = _local_state(job) if isinstance(job, LocalJob) else job_state(job.job_id)
            if state != before[job.job_id]:
                print(f"job {job.job_id}: {state}", flush=True)
        now[job.job_id] = state
    return now


def _local_state(job: LocalJob) -> str:
    if not job.done():
        return "RUNNING"
    codes = {_exit_code(job, rank) for rank in range(job.num_tasks)}
    if codes == {0}:
        return "COMPLETED"
    return STOPPED if codes == {EXIT_STOPPED} else "FAILED"


def _exit_code(job: LocalJob, rank: int) -> int | None:
    """What a rank's TrainJob has returned; None where it has ended otherwise."""
    task = job.task(rank)
    if not task.paths.result_pickle.exists() or task.exception() is not None:
        return None
    code: int = task.result()
    return code


def _interrupt(jobs: Sequence[Job]) -> bool:
    """Ask jobs on this machine to save and stop; False where they are the cluster's."""
    local = [job for job in jobs if isinstance(job, LocalJob)]
    for job in local:
        os.kill(int(job.job_id), signal.SIGTERM)  # the controller, which passes it on to the ranks
    if not local:
        print("no longer followed: the jobs go on", file=sys.stderr)
    return bool(local)


class _Tail:
    """Shows what is appended to a file that may not exist yet."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path, self._stream = path, stream
        self._offset = path.stat().st_size if path.exists() else 0

    def show(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        self._offset += len(text)
        self._stream.write(text.decode(errors="replace"))
        self._stream.flush()
