"""How a run is doing, in RUN/status.json: written by rank 0, read by `nldist status` and by the launcher."""

import contextlib
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nldist.dist.environment import job_id, num_restarts
from nldist.errors import UserError, one_line
from nldist.files import write_text

STATUS_FILE = "status.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"
_FLOCK = "hhqqi4x"  # Linux's struct flock: type, whence, start, length, process
_SILENT_SECONDS = 120  # without a sign of life: a line comes every track.every_seconds


class StatusFile:
    """The facts about a run that change while it runs. On ranks other than 0 it does nothing."""

    def __init__(self, run_dir: Path, *, writes: bool = True) -> None:
        self._path, self._writes = run_dir / STATUS_FILE, writes
        self._facts: dict[str, Any] = {}

    @contextlib.contextmanager
    def of_job(self, world_size: int) -> Iterator[None]:
        """Record where the run runs, and its failure if it ends so."""
        self.update(
            state="running",
            world_size=world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=job_id(),
            num_restarts=num_restarts(),
            started=time.time(),
        )
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # such as the full disk that made it fail
                self.update(state="failed", error=one_line(error))
            raise

    def update(self, **facts: Any) -> None:
        """Set these facts, keep the others."""
        if self._writes:
            self._facts |= facts | {"updated": time.time()}
            write_text(self._path, json.dumps(self._facts, indent=2) + "\n")


def read_status(run_dir: Path) -> dict[str, Any]:
    """What RUN/status.json holds.

    Raises:
        UserError: no job has begun there.
    """
    if not (run_dir / STATUS_FILE).exists():
        raise UserError(f"{run_dir} has no {STATUS_FILE}: no job has begun there")
    return _read(run_dir / STATUS_FILE)


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file of a run holds."""
    try:
        facts = json.loads(file.read_text())
        if isinstance(facts, dict):
            return facts
        problem = "it holds no JSON object"
    except (OSError, ValueError) as error:
        problem = one_line(error)
    raise UserError(f"{file} is damaged ({problem}): delete it, the command that made the run writes it again")


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """What RUN/summary.json holds; None until the run has ended."""
    return _read(run_dir / SUMMARY_FILE) if (run_dir / SUMMARY_FILE).exists() else None


def is_claimed(run_dir: Path) -> bool:
    """Whether a job has the run directory now; True where that cannot be told. Not for the process that has it."""
    if sys.platform != "linux":
        return True
    try:
        with (run_dir / LOCK_FILE).open("r+") as lock:
            # Only asks: taking the lock, however briefly, could turn away a job that starts.
            answer = fcntl.fcntl(lock, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return True
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def describe(facts: dict[str, Any], now: float, is_claimed: bool = True) -> Iterator[str]:
    """A run's status as lines for people, at time `now` (seconds since 1970); `is_claimed`: a job has its directory."""
    silent = now - facts["updated"]
    state = facts["state"]
    if state == "running" and not is_claimed:
        state = "died: no process has the run directory any more; the same command goes on"
    elif state == "running" and silent > max(_SILENT_SECONDS, 3 * facts.get("every_seconds", 0)):
        state = f"silent: no sign of life for {clock(silent)}; killed, or in a step that takes so long"
    yield f"state     {state}" + (f" ({facts['error']})" if facts.get("error") else "")
    if "place" in facts:
        yield f"at        {facts['place']}"
    if "step" in facts:
        rate = f", {facts['images_per_second']:,.0f} img/s" if facts["images_per_second"] else ""
        yield f"step      {facts['step']} of {facts['num_steps']} of this pass{rate}"
    if facts.get("ends") and facts["state"] == "running" and is_claimed:
        yield f"left      {clock(max(facts['ends'] - now, 0))} of stage {facts['stage']} at the last epoch's pace"
    for name, value in facts.get("metrics", {}).items():
        yield f"          {name} {value:.4g}"
    job = f"job {facts['job']}" if facts["job"] else f"process {facts['pid']}"
    yield f"runs as   {job} on {facts['host']}, {facts['world_size']} rank(s), restarts: {facts['num_restarts']}"
    yield f"heard of  {clock(silent)} ago; running for {clock(facts['updated'] - facts['started'])}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
