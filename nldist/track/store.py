"""MLflow stores: opening one, making one, and what may be written to it."""

import contextlib
import os
import re
import shlex
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nldist.errors import UserError
from nldist.track.migrate import migrate_copied, refuse_older

if TYPE_CHECKING:  # which imports torch
    from nldist.config import Config

MAX_NAME_LENGTH = 250
DATABASES = r"(postgresql|mysql|mssql)(\+\w+)?://"
ODD = "%?#"  # what has a meaning in a URI


def resolve_uri(uri: str) -> str:
    """A store's URI with the path of a SQLite file, which stands in it as it is, made absolute.

    Raises:
        UserError: MLflow has no such store.
    """
    if (database := sqlite_path(uri)) is not None:
        if set(database.name) & set(ODD):
            raise UserError(f"track.uri: MLflow would misread the file name {database.name!r}; give one without {ODD}")
        return f"sqlite:///{database.absolute()}"
    if not re.match(f"https?://|{DATABASES}", uri):
        raise UserError(f"track.uri: {uri!r} is no MLflow store: use sqlite:////PATH/mlflow.db or http://HOST:PORT")
    return uri


def store_uri(config: "Config") -> str:
    """The MLflow store of a run: the one it names, else a file beside its directory."""
    return config.track.uri or f"sqlite:///{config.run.dir.absolute().parent / 'mlflow.db'}"


def connect(uri: str) -> tuple[Any, str | None]:
    """An `MlflowClient` for a store, after making the SQLite file if there is none; and what there is to tell of it.

    For a process of its own: it changes to the directory of a SQLite file. MLflow then knows the file by its name
    alone, and no directory's % ? # has a place in a URI, where MLflow's and SQLAlchemy's releases read it differently.

    Raises:
        UserError: the store is of an older MLflow, and none that could be copied before it is migrated.
    """
    from mlflow import MlflowClient

    database, told = sqlite_path(uri), None
    if database is not None:
        database.parent.mkdir(parents=True, exist_ok=True)
        os.chdir(database.parent)
        uri = f"sqlite:///{database.name}"
        if database.exists():
            told = migrate_copied(database)
        else:
            create_database(database)
    elif re.match(DATABASES, uri):
        refuse_older(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri), told


def create_database(path: Path) -> None:
    """Make MLflow's tables in a file aside, then put it in place unless another job was first. In the file's directory.

    MLflow creates and migrates in place without a lock: jobs that start together fail in each other's steps.
    Aside, the migrations need not reach the disk one by one, which takes seconds: one flush at the end does.
    """
    from mlflow import MlflowClient
    from sqlalchemy import Engine, event

    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    event.listen(Engine, "connect", _without_flush)
    try:
        MlflowClient(tracking_uri=f"sqlite:///{part.name}", registry_uri=f"sqlite:///{part.name}").search_experiments()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        event.remove(Engine, "connect", _without_flush)
        part.unlink(missing_ok=True)


def _without_flush(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous = OFF")


def sqlite_path(uri: str) -> Path | None:
    """The file of a `sqlite:///PATH` store, None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def open_command(uri: str) -> str:
    """What to type (or which page to open) to look at a store."""
    if uri.startswith("http"):
        return masked(uri)
    database, command = sqlite_path(uri), "mlflow ui --backend-store-uri "
    if database is not None and set(str(database)) & set(ODD):
        return f"cd {shlex.quote(str(database.parent))} && {command}{shlex.quote(f'sqlite:///{database.name}')}"
    return command + shlex.quote(masked(uri))


def valid_name(name: str) -> str:
    """A name that MLflow takes: odd characters become "_", empty and dotted path parts go, 250 at most."""
    parts = re.sub(r"[^\w\-. :/]", "_", name)[:MAX_NAME_LENGTH].split("/")
    return "/".join(part for part in parts if part.strip(".")) or "_"


def masked(uri: str) -> str:
    """A URI without its password."""
    return re.sub(r"://[^/@]*@", "://***@", uri)


def artifact_root(uri: str, experiment: str, run_root: Path) -> str | None:
    """Where an experiment's artifacts go: beside a SQLite file, in `run_root` for another data base.

    None for a server, which chooses for itself.
    """
    database = sqlite_path(uri)
    if database is None and not re.match(DATABASES, uri):
        return None
    parent = database.parent if database else run_root
    return (parent / "mlartifacts" / re.sub(r"[^\w\-.]", "_", experiment)).resolve().as_uri()
