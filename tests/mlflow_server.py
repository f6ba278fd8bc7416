"""A real MLflow server, and what it holds of a run."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nldist.track.jsonl import to_number
from nldist.track.sender import HEAD

# What `mlflow server` serves. The slow import is done once, then every start is a fork.
SERVER = """
import os, signal, sys
from mlflow import server
folder, port = sys.argv[1], int(sys.argv[2])
os.environ[server.BACKEND_STORE_URI_ENV_VAR] = f"sqlite:///{folder}/m.db"
os.environ[server.ARTIFACT_ROOT_ENV_VAR] = "mlflow-artifacts:/"
os.environ[server.ARTIFACTS_DESTINATION_ENV_VAR] = f"{folder}/artifacts"
os.environ[server.SERVE_ARTIFACTS_ENV_VAR] = "true"
child = 0
for command in sys.stdin:
    if command == "start\\n":
        child = os.fork()
        if child == 0:
            server.app.run("127.0.0.1", port)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
"""


class Server:
    """A tracking server on a port of this machine, over a SQLite file that outlives it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._running = False
        with (folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", SERVER, folder, str(self.port)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
            )

    def start(self) -> None:
        self._command(b"start\n")
        self._running = True
        wait_for(self._answers)

    def kill(self) -> None:
        if self._running:
            self._command(b"kill\n")
            self._running = False
            wait_for(lambda: not self._answers())

    def close(self) -> None:
        self.kill()
        self._process.communicate()

    def _command(self, command: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command)
        self._process.stdin.flush()

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def records(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def client(uri: str) -> Any:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def points_in_mlflow(uri: str, run_id: str) -> dict[str, list[tuple[int, int, float]]]:
    store = client(uri)
    names = [name for name in store.get_run(run_id).data.metrics if not name.startswith("system/")]
    return {
        name: sorted((m.step, m.timestamp, m.value) for m in store.get_metric_history(run_id, name)) for name in names
    }


def points_in_lines(run_dir: Path) -> dict[str, list[tuple[int, int, float]]]:
    points: dict[str, list[tuple[int, int, float]]] = {}
    for record in records(run_dir):
        for name in record.keys() - set(HEAD):
            if (value := to_number(record[name])) is not None:
                points.setdefault(name, []).append((record["step"], round(record["time"] * 1000), value))
    return {name: sorted(rows) for name, rows in points.items()}


def wait_for(condition: Callable[[], Any], seconds: float = 90) -> Any:
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.05)
    return value
