"""The process beside a run that sends its records to MLflow (`python -m nldist.track.sender RUN`).

It is a process, not a thread of the run: importing mlflow takes seconds of the interpreter lock and loads
pandas and pyarrow, a data worker forked meanwhile inherits a locked import, and a hanging request can be
killed with the process.

The run appends to RUN/metrics.jsonl (metrics) and RUN/.mlflow.jsonl (all else that MLflow is to be told).
This process reads both from the offsets that it keeps in RUN/.mlflow.json. An offset moves on after the
store has confirmed, so a batch may be sent twice, never lost; MLflow keeps a point of equal name, step, time
and value once.
"""

import argparse
import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nldist.files import write_text
from nldist.run.status import METRICS_FILE
from nldist.track.jsonl import read_lines, to_number
from nldist.track.store import artifact_root, connect, masked, valid_name
from nldist.track.system import SYSTEM_FILE, sample_system

OUTBOX_FILE = ".mlflow.jsonl"
STATE_FILE = ".mlflow.json"
JOB_TAG = "nldist.job"
HEAD = ("time", "kind", "epoch", "step", "world_size", "moved")  # of a line of metrics: what places its values

MAX_METRICS_PER_BATCH = 1000  # limits of MLflow's log_batch
MAX_PARAMS_PER_BATCH = 100
POLL_SECONDS = 1.0
MAX_RETRY_SECONDS = 30.0
LAST_RETRY_SECONDS = 2.0  # between attempts once the run has ended and waits


@dataclass
class State:
    """What of a run MLflow already has: the content of RUN/.mlflow.json."""

    uri: str
    experiment_id: str | None = None
    run_id: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    artifacts: list[list[str]] = field(default_factory=list)  # (path, folder) still to be sent

    @classmethod
    def load(cls, run_dir: Path, uri: str) -> "State":
        """The state kept for the store `uri`; an empty one where there is none, or another store's.

        A file that a failed node left empty counts as none: the run is found by its tag, and points that are
        sent again are kept once.
        """
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            state = cls(**json.loads((run_dir / STATE_FILE).read_text()))
            if state.uri == uri:
                return state
        return cls(uri)

    def save(self, run_dir: Path) -> None:
        """Replace RUN/.mlflow.json in one step."""
        write_text(run_dir / STATE_FILE, json.dumps(asdict(self)))


class Sender:
    """Brings one MLflow run up to date with a run directory."""

    def __init__(self, run_dir: Path) -> None:
        """Take store, experiment and name from the run's last start in its outbox."""
        self.run_dir = run_dir.absolute()  # the process changes its directory (see `connect`)
        starts = [event for event, _ in read_lines(run_dir / OUTBOX_FILE) if event["event"] == "start"]
        self._first_start, self._start = starts[0], starts[-1]
        self.uri: str = self._start["uri"]
        self._state = State.load(run_dir, self.uri)
        self._mlflow: Any = None

    def send(self) -> None:
        """Send all that the run directory holds and MLflow does not. Raises whatever MLflow raises."""
        if self._mlflow is None:
            self._mlflow, told = connect(self.uri)
            if told:
                say(told)
        if self._state.run_id is None:
            self._open_run()
        self._send_metrics(METRICS_FILE)
        self._send_metrics(SYSTEM_FILE)
        for event, end in read_lines(self.run_dir / OUTBOX_FILE, self._offset(OUTBOX_FILE)):
            self._send_event(event)
            self._confirm(OUTBOX_FILE, end)
        self._send_artifacts()

    def _open_run(self) -> None:
        """Find this job's MLflow run by its tag (a creation whose answer got lost), or create it."""
        state, job = self._state, self._first_start["job"]
        state.experiment_id = self._experiment_id()
        parent, tags = self._start.get("parent"), {}
        if parent and (parents := self._find(parent)):  # else its tracker could not make it in time
            tags["mlflow.parentRunId"] = parents[0].info.run_id
        found = self._find(job)
        run = found[0] if found else self._create_run(job, tags)
        state.run_id = run.info.run_id
        state.save(self.run_dir)

    def _find(self, job: str) -> list[Any]:
        """The MLflow run with this tag, if any."""
        experiments = [self._state.experiment_id]
        return list(self._mlflow.search_runs(experiments, f"tags.`{JOB_TAG}` = '{job}'", max_results=1))

    def _create_run(self, job: str, tags: dict[str, str]) -> Any:
        return self._mlflow.create_run(
            self._state.experiment_id,
            start_time=_milliseconds(self._first_start),
            tags=tags | {JOB_TAG: job, "mlflow.source.name": "nldist", "mlflow.user": self._start["user"]},
            run_name=self._start["run_name"],
        )

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._start["experiment"]
        experiment = self._mlflow.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(
                    self._mlflow.create_experiment(
                        name, artifact_location=artifact_root(self.uri, name, self.run_dir.parent)
                    )
                )
            except MlflowException:  # another job that started at the same time may have created it
                experiment = self._mlflow.get_experiment_by_name(name)
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _send_metrics(self, name: str) -> None:
        batch: list[Any] = []
        end = self._offset(name)
        for record, line_end in read_lines(self.run_dir / name, end):
            batch.extend(metrics_of(record))
            end = line_end
            if len(batch) >= MAX_METRICS_PER_BATCH:
                self._send_batch(batch, name, end)
                batch = []
        if end > self._offset(name):
            self._send_batch(batch, name, end)

    def _send_batch(self, batch: list[Any], name: str, end: int) -> None:
        for chunk in _chunks(batch, MAX_METRICS_PER_BATCH):
            self._mlflow.log_batch(self._state.run_id, metrics=chunk, synchronous=True)
        self._confirm(name, end)

    def _send_event(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Param

        run_id = self._state.run_id
        if event["event"] == "start":
            self._mlflow.update_run(run_id, status="RUNNING")
        elif event["event"] == "params":
            params = [Param(valid_name(key), value) for key, value in event["params"].items()]
            for chunk in _chunks(params, MAX_PARAMS_PER_BATCH):
                self._mlflow.log_batch(run_id, params=chunk, synchronous=True)
        elif event["event"] == "tags":
            for key, value in event["tags"].items():
                self._mlflow.set_tag(run_id, valid_name(key), value)
        elif event["event"] == "artifact":
            if [event["path"], event["folder"]] not in self._state.artifacts:
                self._state.artifacts.append([event["path"], event["folder"]])
        else:
            self._mlflow.set_terminated(run_id, event["status"], _milliseconds(event))

    def _send_artifacts(self) -> None:
        """Last: an artifact store that refuses (a common misconfiguration) holds up nothing else."""
        while self._state.artifacts:
            path, folder = self._state.artifacts[0]
            if (self.run_dir / path).exists():
                self._mlflow.log_artifact(self._state.run_id, str(self.run_dir / path), folder or None)
            else:
                say(f"{self.run_dir / path} is gone: MLflow goes without it")
            self._state.artifacts.pop(0)
            self._state.save(self.run_dir)

    def _offset(self, name: str) -> int:
        """A file may be shorter than what was sent of it: a node that failed can lose its last lines."""
        path = self.run_dir / name
        return min(self._state.offsets.get(name, 0), path.stat().st_size if path.exists() else 0)

    def _confirm(self, name: str, end: int) -> None:
        self._state.offsets[name] = end
        self._state.save(self.run_dir)


def metrics_of(record: dict[str, Any]) -> Iterator[Any]:
    """The MLflow metrics in a line: its numbers, all at the line's step and time."""
    from mlflow.entities import Metric

    for key, value in record.items():
        number = None if key in HEAD else to_number(value)
        if number is not None:
            yield Metric(valid_name(key), number, _milliseconds(record), record["step"])


def say(text: str) -> None:
    """One line for the user, on the run's own stderr."""
    print(f"nldist: {text}", file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def follow(sender: Sender, stop: threading.Event) -> None:
    """Send until `stop` is set and all is sent. A failure is told once, retries come ever more slowly."""
    away, delay = False, POLL_SECONDS
    while True:
        last = stop.is_set()
        try:
            sender.send()
        except Exception as error:  # whatever it is, the run goes on and the records wait on disk
            if not away:
                say(
                    f"MLflow at {masked(sender.uri)} does not take the records ({reason(error)}). "
                    f"The run goes on, {sender.run_dir / METRICS_FILE} has everything, MLflow gets it later."
                )
            away, delay = True, min(2 * delay, MAX_RETRY_SECONDS)
        else:
            if away:
                say(f"MLflow at {masked(sender.uri)} is back and up to date.")
            if last:
                return
            away, delay = False, POLL_SECONDS
        if last:
            time.sleep(min(delay, LAST_RETRY_SECONDS))
        else:
            stop.wait(delay)


def main() -> int:
    """Follow a run directory until stdin says "end" and all is sent; leave at once when stdin closes."""
    # A scheduler's or a terminal's signals are for the run, which decides when this process is done.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # training and its data workers come first
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--once", action="store_true", help="one attempt: exit 1 and say why if it fails")
    parser.add_argument("--system-seconds", type=float, help="sample the system at this interval")
    args = parser.parse_args()
    stop = threading.Event()
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    sender = Sender(args.run_dir)
    if args.once:
        try:
            sender.send()
        except Exception as error:
            print(reason(error), file=sys.stderr)
            return 1
        return 0
    if args.system_seconds:
        threading.Thread(target=sample_system, args=(sender.run_dir, args.system_seconds), daemon=True).start()
    follow(sender, stop)
    return 0


def _watch_parent(stop: threading.Event) -> None:
    """Set `stop` when the parent asks for the end; leave when it is gone, even out of a hanging request.

    The parent's id is looked at too: data workers that it forked hold the pipe open after its death.
    """
    parent = os.getppid()
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], 1.0)[0]:
            if os.read(sys.stdin.fileno(), 64):
                stop.set()
            else:
                break
    os._exit(3)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _milliseconds(record: dict[str, Any]) -> int:
    return int(record["time"] * 1000 + 0.5)


if __name__ == "__main__":
    # Not a plain exit: a thread of mlflow's or a hanging request must not keep the process.
    code = main()
    sys.stderr.flush()
    os._exit(code)
