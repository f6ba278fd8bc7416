import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nldist.errors import UserError
from nldist.track import tracker as track
from nldist.track.jsonl import read_lines
from nldist.track.sender import Sender
from nldist.track.tracker import Tracker, flatten, sync
from tests.mlflow_server import Server, client, points_in_lines, points_in_mlflow, records, wait_for

PARAMS = {"method": {"name": "dividemix", "lambda_u": 25.0, "views": [{"crop": 32}]}, "seed": None, "world_size": 2}


def make_tracker(run_dir: Path, uri: str | None, **options: Any) -> Tracker:
    return Tracker(run_dir, uri=uri, experiment="tests", run_name=run_dir.name, params=PARAMS, **options)


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# With a SQLite store


def test_mlflow_gets_all_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track, "SYSTEM_SECONDS", 0.1)
    run_dir, uri = tmp_path / "runs/a", f"sqlite:///{tmp_path}/runs/mlflow.db"
    tracker = make_tracker(run_dir, uri, system_metrics=True)
    many = {f"class/{k}": k / 7 for k in range(1100)}  # more than one batch holds
    for step in range(4):
        tracker.log({"loss": step / 3, "text": "a", "none": None, **many}, epoch=0, step=step)
    tracker.log({"bad": math.nan}, epoch=0, step=4)
    (run_dir / "config.yaml").write_text("seed: 1\n")
    tracker.artifact(run_dir / "config.yaml")
    tracker.artifact(run_dir / "config.yaml", "again/here")
    tracker.artifact(run_dir / "lost.png")
    tracker.set_tags({"dataset": "digits", "long": "x" * 9000})
    wait_for(lambda: tracker.mlflow_run_id)
    assert tracker._sender is not None
    os.kill(tracker._sender.pid, signal.SIGTERM)  # a scheduler's warning is not for the sender
    wait_for(lambda: any(read_lines(run_dir / "system.jsonl")))
    tracker.end("FINISHED")

    run_id = tracker.mlflow_run_id
    assert run_id is not None
    run = client(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a"
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == dict(flatten(PARAMS))
    assert run.data.tags["dataset"] == "digits"
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    sent, written = points_in_mlflow(uri, run_id), points_in_lines(run_dir)
    assert math.isnan(sent.pop("bad")[0][2])
    assert math.isnan(written.pop("bad")[0][2])
    assert sent == written
    assert len(sent) == 1101
    copies = [path.relative_to(tmp_path / "runs") for path in tmp_path.rglob("config.yaml")]
    folder = Path("mlartifacts/tests") / run_id / "artifacts"
    assert set(copies) == {Path("a/config.yaml"), folder / "config.yaml", folder / "again/here/config.yaml"}
    assert sorted(os.listdir(tmp_path / "runs")) == ["a", "mlartifacts", "mlflow.db"]
    assert os.listdir(tmp_path) == ["runs"]
    assert tracker.open_command == f"mlflow ui --backend-store-uri {uri}"


KILLED = """
import os, sys, signal, time
from pathlib import Path
from nldist.track.tracker import Tracker
run_dir, uri = Path(sys.argv[1]), sys.argv[2]
tracker = Tracker(run_dir, uri=uri, experiment="tests", run_name="k", params={"epochs": 2, "world_size": 1})
print(tracker._sender.pid, flush=True)
step = 0
while True:
    tracker.log({"loss": step * 0.5}, epoch=0, step=step)
    step += 1
    time.sleep(0.002)
    if step >= 50 and tracker.mlflow_run_id:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_with_its_mlflow_run(tmp_path: Path) -> None:
    run_dir, uri = tmp_path / "k", f"sqlite:///{tmp_path}/mlflow.db"
    killed = subprocess.run([sys.executable, "-c", KILLED, run_dir, uri], stdout=subprocess.PIPE, check=False)
    assert killed.returncode == -signal.SIGKILL
    wait_for(lambda: gone(int(killed.stdout)))
    run_id = json.loads((run_dir / ".mlflow.json").read_text())["run_id"]
    last = records(run_dir)[-1]["step"]

    tracker = Tracker(
        run_dir, uri=uri, experiment="tests", run_name="k", params={"epochs": 3, "world_size": 1, "new": "x"}
    )
    for step in range(last - 20, last + 30):
        tracker.log({"loss": step * 0.5}, epoch=1, step=step)
    tracker.end("FAILED")
    assert tracker.mlflow_run_id == run_id
    assert [record["step"] for record in records(run_dir)] == list(range(last + 30))
    store = client(uri)
    (run,) = store.search_runs([store.get_experiment_by_name("tests").experiment_id])
    assert (run.info.run_id, run.info.status) == (run_id, "FAILED")
    assert run.data.params == {"epochs": "2", "world_size": "1", "new": "x"}
    assert run.data.tags["changed.epochs"] == "3"
    assert points_in_mlflow(uri, run_id) == points_in_lines(run_dir)


def test_jobs_that_start_together_share_a_new_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    trackers = [make_tracker(tmp_path / name, uri) for name in "ab"]
    for tracker in trackers:
        tracker.log({"loss": 1.0}, epoch=0, step=0)
    for tracker in trackers:
        tracker.end("FINISHED")
    store = client(uri)
    runs = store.search_runs([store.get_experiment_by_name("tests").experiment_id])
    assert sorted((run.info.run_name, run.info.status) for run in runs) == [(n, "FINISHED") for n in "ab"]
    assert {run.info.run_id for run in runs} == {tracker.mlflow_run_id for tracker in trackers}
    assert all(run.data.metrics == {"loss": 1.0} for run in runs)
    assert os.listdir(tmp_path / "new") == ["mlflow.db"]


# With a server


def test_a_server_that_is_away_neither_stops_nor_slows_a_run(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    mute, cut = tmp_path / "mute", tmp_path / "cut"

    # A server that takes connections and never answers: the run ends without it.
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", server.port))
        listener.listen()
        tracker = make_tracker(mute, server.uri)
        connection, _ = listener.accept()
        for step in range(200):
            tracker.log({"loss": step / 3}, epoch=0, step=step)
        assert len(records(mute)) == 200  # all written while the sender hangs in its first request
        (mute / "config.yaml").write_text("seed: 1\n")
        tracker.artifact(mute / "config.yaml")
        with caplog.at_level(logging.WARNING):
            tracker.end("KILLED", timeout_seconds=0.5)
        connection.close()
    assert tracker.mlflow_run_id is None
    (warning,) = caplog.records
    assert warning.getMessage().endswith(f"send the rest later: nldist sync {mute}")
    with pytest.raises(UserError, match=r"MLflow did not take the records: .*[Cc]onnection"):
        sync(mute)

    # A server that dies in the middle of a run and comes back before its end.
    server.start()
    tracker = make_tracker(cut, server.uri)
    tracker.log({"loss": 0.0}, epoch=0, step=0)
    run_id = wait_for(lambda: tracker.mlflow_run_id)
    wait_for(lambda: json.loads((cut / ".mlflow.json").read_text())["offsets"].get("metrics.jsonl"))
    server.kill()
    for step in range(1, 300):
        tracker.log({"loss": step / 3, "lr": 0.1}, epoch=0, step=step)
    noise = wait_for(lambda: capfd.readouterr().err)
    assert noise.count("does not take the records") == 1
    server.start()
    for step in range(300, 400):
        tracker.log({"loss": step / 3}, epoch=0, step=step)
    tracker.end("FINISHED")
    assert len(noise.splitlines()) == 1
    assert "is back and up to date" in capfd.readouterr().err
    assert tracker.mlflow_run_id == run_id
    assert points_in_mlflow(server.uri, run_id) == points_in_lines(cut)
    assert client(server.uri).get_run(run_id).info.status == "FINISHED"

    # The first run is sent now; sending all of it once more changes nothing.
    sync(mute)
    (mute / ".mlflow.json").write_bytes(b"")
    Sender(mute).send()
    store = client(server.uri)
    runs = store.search_runs([store.get_experiment_by_name("tests").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["cut", "mute"]
    (run,) = (run for run in runs if run.info.run_name == "mute")
    assert run.info.status == "KILLED"
    assert points_in_mlflow(server.uri, run.info.run_id) == points_in_lines(mute)
    assert [file.path for file in store.list_artifacts(run.info.run_id)] == ["config.yaml"]


def test_sync_needs_a_tracked_run(tmp_path: Path) -> None:
    make_tracker(tmp_path, None).end("FINISHED")
    with pytest.raises(UserError, match="holds no run that was tracked"):
        sync(tmp_path)
