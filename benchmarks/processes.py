"""Commands and ranks as processes of their own: how long they take, and how much memory each of them at most.

Memory is the most that was seen, not what wait4 tells: in that is what the parent had
(findings/peak_memory_of_a_command.sh), and code that is read to unload torch (findings/torch_exit_memory.sh).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nldist.errors import UserError

_POLL_SECONDS = 0.05
_STOPPED = 143  # a rank's exit code after SIGTERM


@dataclass(frozen=True)
class Cost:
    """Of processes that have ended, and those below them: seconds from the start, the largest one's peak in MiB."""

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
        self._memory: dict[int, _Memory] = {}

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
            if self._collect() != [None] * len(self._processes):
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
        self._wait()
        return max(memory.peak_mib for memory in self._memory.values())

    def end(self, *codes: int) -> Cost:
        """Wait until all have ended.

        Raises:
            UserError: one with another code than these; by default than 0.
        """
        self._wait()
        if any(process.returncode not in (codes or (0,)) for process in self._processes):
            found = ", ".join(str(process.returncode) for process in self._processes)
            raise UserError(f"{' '.join(self.commands[0])} ended with code {found}; see {self.log}")
        return Cost(self.seconds, max(memory.peak_mib for memory in self._memory.values()))

    def _wait(self) -> None:
        while None in self._collect():
            time.sleep(_POLL_SECONDS)

    def _collect(self) -> list[int | None]:
        """Look at their peaks and those of what they have started; the exit code of each, None while it runs."""
        for pid in _with_descendants([process.pid for process in self._processes]):
            with contextlib.suppress(OSError):
                self._memory.setdefault(pid, _Memory()).look(Path(f"/proc/{pid}/status").read_text())
        return [process.poll() for process in self._processes]


def _with_descendants(pids: list[int]) -> list[int]:
    found = list(pids)
    for pid in found:
        for children in Path("/proc").glob(f"{pid}/task/*/children"):
            with contextlib.suppress(OSError):
                found += map(int, children.read_text().split())
    return found


class _Memory:
    """Of one process, less the libraries' code that its last second has brought in."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, float, float]] = deque([(0.0, 0.0, 0.0)])

    def look(self, status: str) -> None:
        """Keep what /proc/PID/status says of a process that has not ended."""
        found = {
            words[0]: float(words[1]) / 1024 for line in status.splitlines() if (words := line.split())[2:] == ["kB"]
        }
        if "VmHWM:" in found:
            self._looks.append((time.perf_counter(), found["VmHWM:"], found["RssFile:"]))
            while len(self._looks) > 2 and self._looks[1][0] < self._looks[-1][0] - 1:
                self._looks.popleft()

    @property
    def peak_mib(self) -> float:
        """The most that it has had."""
        (_, before, code_before), (_, peak, code) = self._looks[0], self._looks[-1]
        return max(before, peak - max(code - code_before, 0))


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
