"""Commands and ranks as processes of their own: how long they take, and how much memory each of them at most.

What imports this must stay small: a process keeps over exec the high-water mark of what it was before, its parent's
memory (findings/peak_memory_of_a_command.sh).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nldist.errors import UserError

_POLL_SECONDS = 0.05
_STOPPED = 143  # a rank's exit code after SIGTERM


@dataclass(frozen=True)
class Cost:
    """Of some processes that have ended: seconds from the first one's start, and the largest one's peak in MiB."""

    seconds: float
    peak_mib: float


def run(*arguments: object, log: Path) -> Cost:
    """`python ARGUMENTS` to its end; what it prints goes to the end of `log`."""
    group = Group([list(map(str, arguments))], [{}], log)
    return group.end()


def run_ranks(*arguments: object, log: Path, num_ranks: int = 2) -> Cost:
    """The same on ranks that form a world."""
    return start_ranks(*arguments, log=log, num_ranks=num_ranks).end()


def start_ranks(*arguments: object, log: Path, num_ranks: int = 2) -> "Group":
    """Start `python ARGUMENTS` on ranks that form a world."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    facts = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [facts | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(num_ranks)]
    return Group([list(map(str, arguments))] * num_ranks, places, log)


@dataclass
class Group:
    """Processes that were started together, with one thread each; they end with this one."""

    commands: list[list[str]]
    environments: list[dict[str, Any]]
    log: Path
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as out:
            self._processes = [
                subprocess.Popen([sys.executable, *command], env=_environment(more), stdout=out, stderr=out)
                for command, more in zip(self.commands, self.environments, strict=True)
            ]
        self._peaks: dict[int, float] = {}

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began

    def until(self, reached: Callable[[], bool]) -> float:
        """Wait until `reached()`, or until all have ended well; the seconds since the start then.

        Raises:
            UserError: a process has failed.
        """
        while not reached():
            if self._collect(os.WNOHANG):
                return self.end().seconds
            time.sleep(_POLL_SECONDS)
        return self.seconds

    def stop(self) -> Cost:
        """Ask the first of them to stop, as Slurm does, and wait for all; seconds from the signal on."""
        began = time.perf_counter()
        if self._processes[0].returncode is None:
            self._processes[0].send_signal(signal.SIGTERM)
        peak = self.end(0, _STOPPED).peak_mib
        return Cost(time.perf_counter() - began, peak)

    def kill(self) -> float:
        """End all by SIGKILL; the largest one's peak in MiB."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        self._collect(0)
        return max(self._peaks.values())

    def end(self, *codes: int) -> Cost:
        """Wait until all have ended.

        Raises:
            UserError: one with another code than these; by default than 0.
        """
        self._collect(0)
        if any(process.returncode not in (codes or (0,)) for process in self._processes):
            found = ", ".join(str(process.returncode) for process in self._processes)
            raise UserError(f"{' '.join(self.commands[0])} ended with code {found}; see {self.log}")
        return Cost(self.seconds, max(self._peaks.values()))

    def _collect(self, options: int) -> bool:
        """Take the exit codes and peaks of those that have ended (with options 0 of all); whether any has."""
        for process in self._processes:
            if process.returncode is None:
                pid, status, usage = os.wait4(process.pid, options)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    self._peaks[pid] = usage.ru_maxrss / 1024  # its own or that of one that it waited for
        return bool(self._peaks)


def _environment(more: dict[str, Any]) -> dict[str, str]:
    fixed = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return os.environ | fixed | {name: str(value) for name, value in more.items()}


def status(run_dir: Path) -> dict[str, Any]:
    """RUN/status.json; empty where there is none yet."""
    with contextlib.suppress(OSError, ValueError):
        facts: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
        return facts
    return {}


def bytes_below(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(file.stat().st_size for file in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())
