"""A command in a process of its own that is forked, not started: importing torch again takes seconds each time."""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.ranks import CONTEXT


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int | None
    stdout: str
    stderr: str


class Command:
    """`main(arguments)` in a session of its own, with files `folder`/out and `folder`/err for what it prints."""

    def __init__(
        self, main: Callable[[list[str]], int], arguments: Sequence[object], folder: Path, env: Mapping[str, str]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        self.process: BaseProcess = CONTEXT.Process(
            target=_run, args=(main, list(map(str, arguments)), self._out, self._err, dict(env))
        )
        self.process.start()

    @property
    def pid(self) -> int:
        """Of the process, which is also its group's number."""
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float = 300) -> Done:
        """Until it has ended."""
        try:
            self.process.join(timeout)
        finally:
            alive = self.process.is_alive()
            if alive:
                os.killpg(self.pid, signal.SIGKILL)
                self.process.join()
        if alive:
            raise TimeoutError(f"not ended after {timeout} s:\n{self._out.read_text()}\n{self._err.read_text()}")
        return Done(self.process.exitcode, self._out.read_text(), self._err.read_text())


def _run(main: Callable[[list[str]], int], arguments: list[str], out: Path, err: Path, env: dict[str, str]) -> None:
    os.setsid()
    # Ctrl-C is ignored in what a shell has started in the background, such as these tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(env)
    sys.exit(main(arguments))
