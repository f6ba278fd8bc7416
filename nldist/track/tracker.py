"""The record of a run: JSON lines always, MLflow on top."""

import contextlib
import getpass
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from nldist.errors import UserError
from nldist.run.status import METRICS_FILE
from nldist.track.jsonl import JsonLines, read_lines, to_json
from nldist.track.sender import HEAD, OUTBOX_FILE, State
from nldist.track.store import masked, open_command, resolve_uri

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

MAX_PARAM_LENGTH = 6000  # characters of a value that MLflow keeps
MAX_TAG_LENGTH = 5000
SYSTEM_SECONDS = 10.0
# By default MLflow keeps at one request for minutes: too long to notice that a server is away, or back.
HTTP_SETTINGS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
PRIVACY_SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}


class Tracker:
    """Writes what a run reports to RUN/metrics.jsonl, from where a process of its own feeds MLflow.

    Nothing here waits for MLflow but `end`. For rank 0 only: the other ranks use `NullTracker`.

    Attributes:
        job: the tag nldist.job of the MLflow run; None without MLflow.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str | None,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        system_metrics: bool = False,
        parent: str | None = None,
    ) -> None:
        """Start the record of a run, or go on with the one that `run_dir` holds (and with its MLflow run).

        `uri` names the MLflow store (`sqlite:////...`, `http://...`); None writes JSON lines only. `params`
        may be nested and have `world_size`; MLflow gets dotted names. It keeps a parameter's first value: one that
        a resumed run changed becomes the tag `changed.NAME`. `system_metrics` samples this node into
        RUN/system.jsonl and MLflow (not without MLflow: the numbers are its monitors'). `parent` is the `job`
        of the tracker whose MLflow run this one's is nested under.
        Raises `UserError` for a URI that MLflow has no store for, and for a damaged metrics.jsonl.
        """
        self._run_dir = run_dir.absolute()
        self._uri = resolve_uri(uri) if uri is not None else None
        self._lines = JsonLines(self._run_dir / METRICS_FILE)
        self._world_size: int = params["world_size"]
        self._last = {record["kind"]: record for record, _ in read_lines(self._run_dir / METRICS_FILE)}
        self._outbox: JsonLines | None = None
        self.job: str | None = None
        self._sender: subprocess.Popen[bytes] | None = None
        if self._uri is not None:
            self._open_outbox(params, experiment=experiment, run_name=run_name, parent=parent)
            self._sender = start_sender(
                self._run_dir, *(["--system-seconds", str(SYSTEM_SECONDS)] if system_metrics else [])
            )

    def log(self, values: Mapping[str, float | int | str | None], *, epoch: int, step: int, kind: str = "step") -> None:
        """Record values at a step (of the whole run, 0 or more); the numbers among them are MLflow metrics.

        A resumed run does again what lies behind its checkpoint. On as many ranks as before that is the same
        again: a step not beyond the last one on record is dropped, so that each record is there once. On another
        number of ranks it is something else, so nothing is dropped. Records of kind "step" then stand further on
        by so many steps ("moved") that the first one comes behind the last one on record: their axis is that of
        the work that was done, also of what was left behind. Those of kind "epoch" keep the epoch's number: where
        there are two of an epoch, the run went on from the later one.
        Raises `ValueError` if a value has a name of `HEAD`.
        """
        if clash := set(HEAD) & values.keys():
            raise ValueError(f"names that every record has already: {sorted(clash)}")
        last = self._last.get(kind, {"step": -1})
        moved, again = last.get("moved", 0), last.get("world_size", self._world_size) == self._world_size
        if not again and kind == "step":
            moved = max(moved, last["step"] + 1 - step)
        if again and step + moved <= last["step"]:
            return
        head = {"time": round(time.time(), 3), "kind": kind, "epoch": epoch, "step": step + moved}
        head |= {"world_size": self._world_size} | ({"moved": moved} if moved else {})
        self._lines.append({**head, **values})
        self._last[kind] = head

    def artifact(self, path: Path, folder: str = "") -> None:
        """Let MLflow have a copy of a file of the run, in a folder of its own. Sent as it is at that time."""
        absolute = path.absolute()
        inside = absolute.is_relative_to(self._run_dir)
        kept = absolute.relative_to(self._run_dir) if inside else absolute
        self._tell("artifact", path=str(kept), folder=folder)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the MLflow run; values are cut to 5,000 characters."""
        self._tell("tags", tags={key: str(value)[:MAX_TAG_LENGTH] for key, value in tags.items()})

    def end(self, status: Status, timeout_seconds: float = 60) -> None:
        """Close the record and wait until MLflow has all of it, `timeout_seconds` at most.

        What could not be sent is on disk: a warning says how to send it later. A second call does nothing.
        """
        self._tell("end", status=status)
        self._lines.close()
        if self._outbox is not None:
            self._outbox.close()
            self._outbox = None
        if self._sender is not None:
            code = _finish(self._sender, timeout_seconds)
            self._sender = None
            if code != 0:
                logger.warning(
                    "MLflow at %s does not have all of this run yet; to send the rest later: nldist sync %s",
                    masked(self._uri or ""),
                    shlex.quote(str(self._run_dir)),
                )

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the MLflow run, None until the store has created it."""
        return State.load(self._run_dir, self._uri).run_id if self._uri is not None else None

    @property
    def open_command(self) -> str | None:
        """What to type (or which page to open) to look at the run in MLflow; None without MLflow."""
        return open_command(self._uri) if self._uri is not None else None

    def _open_outbox(self, params: Mapping[str, Any], **start: str | None) -> None:
        """Write this start to the outbox, with the parameters that are new or changed since the last one."""
        path = self._run_dir / OUTBOX_FILE
        self._outbox = JsonLines(path)
        known: dict[str, str] = {}
        self.job = uuid.uuid4().hex
        for event, _ in read_lines(path):
            known.update(event.get("params", {}))
            self.job = event.get("job", self.job)
        self._tell("start", job=self.job, uri=self._uri, user=_user(), **start)
        now = {key: value[:MAX_PARAM_LENGTH] for key, value in flatten(params)}
        if new := {key: value for key, value in now.items() if key not in known}:
            self._tell("params", params=new)
        if changed := {f"changed.{key}": now[key] for key in now if known.get(key, now[key]) != now[key]}:
            self.set_tags(changed)

    def _tell(self, event: str, **values: Any) -> None:
        if self._outbox is not None:
            self._outbox.append({"event": event, "time": round(time.time(), 3), **values})


class NullTracker(Tracker):
    """The tracker of every rank but 0: takes everything, does nothing."""

    def __init__(self) -> None:
        self._uri = self.job = None

    def log(self, values: Mapping[str, float | int | str | None], *, epoch: int, step: int, kind: str = "step") -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Do nothing."""

    def end(self, status: Status, timeout_seconds: float = 60) -> None:
        """Do nothing."""

    @property
    def mlflow_run_id(self) -> None:
        """None: rank 0 has the MLflow run."""
        return None


def sync(run_dir: Path) -> None:
    """Send MLflow what it lacks of a run that has ended (`nldist sync RUN`).

    Raises `UserError` if the directory holds no run tracked with MLflow, or if MLflow does not take it.
    """
    if not (run_dir / OUTBOX_FILE).exists():
        raise UserError(f"{run_dir} holds no run that was tracked with MLflow ({OUTBOX_FILE} is missing)")
    with start_sender(run_dir.absolute(), "--once", stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        errors = process.stderr.read().decode(errors="replace").strip()
        if process.wait() != 0:
            raise UserError(f"{run_dir}: MLflow did not take the records: {errors}")
        if errors:
            print(errors, file=sys.stderr)


def publish(run_dir: Path, files: Iterable[Path], folder: str) -> None:
    """Let MLflow have files of a tracked run that no job is using, in a folder of its own.

    Raises `UserError` if MLflow does not take them: `nldist sync` sends them later.
    """
    outbox = JsonLines(run_dir / OUTBOX_FILE)
    for path in files:
        outbox.append(
            {"event": "artifact", "time": round(time.time(), 3), "path": str(path.absolute()), "folder": folder}
        )
    outbox.close()
    sync(run_dir)


def start_sender(run_dir: Path, *options: str, stderr: int | None = None) -> subprocess.Popen[bytes]:
    """Start `nldist.track.sender` for a run: it ends when told "end" on stdin, or with this process."""
    return subprocess.Popen(
        [sys.executable, "-m", "nldist.track.sender", str(run_dir), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env={**HTTP_SETTINGS, **os.environ, **PRIVACY_SETTINGS},
        start_new_session=True,
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested mappings as (dotted name, text); other collections are one leaf, in JSON."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            yield f"{prefix}{key}", value
        else:
            yield f"{prefix}{key}", json.dumps(to_json(value), default=str)


def _finish(process: subprocess.Popen[bytes], timeout_seconds: float) -> int:
    """Ask the sender to end, wait for it, kill it when the time is up; its exit code."""
    assert process.stdin is not None
    try:
        process.stdin.write(b"end\n")
        process.stdin.flush()
        return process.wait(timeout_seconds)
    except (subprocess.TimeoutExpired, BrokenPipeError):
        process.kill()
        return process.wait()
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under an id without a name
        return str(os.getuid())
