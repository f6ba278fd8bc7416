"""Processes of a test cluster that run in the foreground and log to a file."""

import random
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

POLL_S = 0.05


def until(condition: Callable[[], object], what: str, timeout: float) -> None:
    """Wait until `condition()` is true; raises TimeoutError with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(POLL_S)


def free_ports(number: int, first: int = 17000, last: int = 30000) -> list[int]:
    """`number` TCP ports on which nobody listens, below those that the kernel gives to clients.

    In random order, so that two clusters that start together do not choose the same.
    """
    ports: list[int] = []
    for port in random.sample(range(first, last), last - first):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
        if len(ports) == number:
            return ports
    raise OSError(f"fewer than {number} free ports between {first} and {last}")


def listens(port: int) -> bool:
    """Whether something accepts connections on this port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Daemon:
    """One process in the foreground, with everything that it prints in `log`."""

    def __init__(self, command: list[str], log: Path, env: Mapping[str, str]) -> None:
        self.name = log.stem
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """The process's id, the same before and after it has ended."""
        return self.process.pid

    def wait_until(self, condition: Callable[[], object], timeout: float = 30) -> None:
        """Wait until the daemon is ready; raises RuntimeError with the end of its log if it ends or takes too long."""
        try:
            until(lambda: condition() or self.process.poll() is not None, f"{self.name} to be ready", timeout)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{self.tail()}") from error
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.name} ended with code {self.process.returncode}\n{self.tail()}")

    def tail(self, num_lines: int = 20) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-num_lines:])

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout: float = 5) -> None:
        """SIGTERM, then SIGKILL after `timeout` seconds."""
        self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
