"""Which stores MLflow has: their names and places, and those of an older MLflow."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nldist.errors import UserError
from nldist.track import store
from nldist.track.migrate import older_revision
from nldist.track.store import connect, resolve_uri, valid_name
from nldist.track.tracker import Tracker, sync

ODD = "40%20 of 50%noise?x=1#a"
# As MLflow 2.14 has made them: tables are missing. And the one before the newest.
OLD_REVISIONS = ("867495a8f9d4", "75868b020152")


def make_tracker(run_dir: Path, uri: str | None) -> Tracker:
    return Tracker(run_dir, uri=uri, experiment="tests", run_name=run_dir.name, params={"world_size": 1})


def rows(database: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("train/loss", "train/loss"),
        ("acc/T-shirt & top", "acc/T-shirt _ top"),
        ("/a//../b", "a/b"),
        ("é%", "é_"),
    ],
)
def test_names_become_what_mlflow_takes(name: str, valid: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert valid_name(name) == valid
    _validate_metric_name(valid)
    _validate_metric_name(valid_name("x/" * 300))


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "sqlite:/x.db", ""])
def test_a_uri_without_a_store_is_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UserError, match="MLflow store"):
        make_tracker(tmp_path, uri)


def test_a_relative_sqlite_file_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///a/mlflow.db") == f"sqlite:///{tmp_path}/a/mlflow.db"


@pytest.mark.parametrize("name", ["a%20.db", "a?.db", "a#b.db"])
def test_a_file_name_that_mlflow_would_misread_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"would misread the file name '.*'; give one without %\?#"):
        make_tracker(tmp_path, f"sqlite:///{tmp_path / ODD / name}")


LOOK = """
import json
from mlflow import MlflowClient
client = MlflowClient("sqlite:///mlflow.db", "sqlite:///mlflow.db")
(run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
pictures = client.list_artifacts(run.info.run_id, "plots")
path = client.download_artifacts(run.info.run_id, pictures[0].path)
print(json.dumps([run.info.run_name, run.data.metrics, open(path).read()]))
"""


def test_no_character_of_a_directory_loses_a_run(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    run_dir = folder / "50%run"
    tracker = make_tracker(run_dir, f"sqlite:///{folder}/mlflow.db")
    tracker.log({"loss": 0.5}, epoch=1, step=1)
    (run_dir / "loss.png").write_text("picture")
    tracker.artifact(run_dir / "loss.png", "plots")
    tracker.end("FINISHED")
    assert sorted(os.listdir(folder)) == ["50%run", "mlartifacts", "mlflow.db"]
    assert os.listdir(tmp_path) == [ODD], "and none by another reading of its name"
    seen = subprocess.run([sys.executable, "-c", LOOK], cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(seen.stdout) == ["50%run", {"loss": 0.5}, "picture"]
    assert tracker.open_command is not None
    assert tracker.open_command.endswith(" && mlflow ui --backend-store-uri sqlite:///mlflow.db")
    place = tracker.open_command.partition(" && ")[0] + " && pwd"
    assert subprocess.check_output(place, shell=True, text=True).strip() == str(folder)


OLD = """
import sys
from alembic import command
from mlflow.store.db import utils
from mlflow.store.tracking.dbmodels.initial_models import Base
engine = utils.create_sqlalchemy_engine("sqlite:///" + sys.argv[1])
Base.metadata.create_all(engine)
with engine.begin() as connection:
    config = utils._get_alembic_config(str(engine.url))
    config.attributes["connection"] = connection
    command.upgrade(config, sys.argv[2])
    connection.exec_driver_sql("insert into experiments (name, artifact_location, lifecycle_stage) "
                               "values ('theirs', 'mlruns', 'active')")
"""


@pytest.fixture(scope="module", params=OLD_REVISIONS)
def old_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store as MLflow's own migrations leave it at an older revision, and that revision."""
    database = tmp_path_factory.mktemp("old") / "mlflow.db"
    subprocess.run([sys.executable, "-c", OLD, database, request.param], check=True, capture_output=True)
    return database, request.param


def test_a_store_of_an_older_mlflow_is_copied_before_it_is_migrated(
    old_store: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs#"
    folder.mkdir()
    database, revision = folder / "mlflow.db", old_store[1]
    shutil.copy(old_store[0], database)
    schema = "select sql from sqlite_master order by name"
    before = rows(database, schema)
    trackers = [make_tracker(folder / name, f"sqlite:///{database}") for name in "ab"]
    for tracker in trackers:
        tracker.log({"loss": 0.5}, epoch=1, step=1)
    for tracker in trackers:
        tracker.end("FINISHED")
    copy = folder / f"mlflow.db.{revision}"
    (told,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("nldist:")]
    assert told.startswith(f"nldist: {database} was of an older MLflow; MLflow 3.")
    assert told.endswith(f" has migrated it, {copy} is as it was")
    assert rows(copy, schema) == before
    assert rows(copy, "select version_num from alembic_version") == [(revision,)]
    assert rows(database, "select version_num from alembic_version") != [(revision,)]
    for file in (copy, database):
        assert ("theirs",) in rows(file, "select name from experiments")
    assert rows(database, "select key, value from metrics") == [("loss", 0.5)] * 2
    assert sorted(os.listdir(folder)) == ["a", "b", "mlflow.db", copy.name]


@pytest.mark.parametrize("old_store", OLD_REVISIONS[1:], indirect=True)
def test_sync_tells_of_it_too(old_store: tuple[Path, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = make_tracker(tmp_path / "a", f"sqlite:///{tmp_path}/mlflow.db")
    tracker.end("FINISHED")
    shutil.copy(old_store[0], tmp_path / "mlflow.db")
    (tmp_path / "a" / ".mlflow.json").unlink()
    assert "migrated" not in capfd.readouterr().err
    sync(tmp_path / "a")
    assert "has migrated it" in capfd.readouterr().err


def test_a_data_base_of_an_older_mlflow_is_refused(
    old_store: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SQLite in the place of a server, which a test has not."""
    shutil.copy(old_store[0], tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setattr(store, "sqlite_path", lambda uri: None)
    monkeypatch.setattr(store, "DATABASES", "sqlite")
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(UserError, match=rf"older MLflow \({old_store[1]}\); make a copy, then: mlflow db upgrade"):
        connect(uri)
    assert (tmp_path / "mlflow.db").read_bytes() == before


def test_a_store_of_a_newer_mlflow_is_left_as_it_is(old_store: tuple[Path, str], tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copy(old_store[0], database)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("update alembic_version set version_num = 'fedcba987654'")
        connection.commit()
    assert older_revision(f"sqlite:///{database}") is None
    tracker = make_tracker(tmp_path / "a", f"sqlite:///{database}")
    tracker.end("FINISHED", timeout_seconds=0.1)
    assert rows(database, "select version_num from alembic_version") == [("fedcba987654",)]
    assert sorted(os.listdir(tmp_path)) == ["a", "mlflow.db"]
