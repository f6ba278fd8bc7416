"""Stores of an older MLflow. MLflow migrates one for good as soon as it opens it: older tools then cannot read it."""

import contextlib
import fcntl
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from nldist.errors import UserError
from nldist.files import free_name, replacing


def migrate_copied(database: Path) -> str | None:
    """Migrate a SQLite store of an older MLflow, after copying it; what there is to tell, None where it is up to date.

    In the file's directory. One process does it, others wait: MLflow itself takes no lock.

    Raises:
        UserError: MLflow cannot migrate it.
    """
    import mlflow

    uri = f"sqlite:///{database.name}"
    if older_revision(uri) is None:
        return None
    with _alone(database.with_name(f".{database.name}.lock")):
        revision = older_revision(uri)
        if revision is None:  # another process has done it
            return None
        copy = free_name(database.with_name(f"{database.name}.{revision}"))
        with replacing(copy) as aside:
            _copy(database, aside)
        done = subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"mlflow db upgrade of {database} failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    return f"{database} was of an older MLflow; MLflow {mlflow.__version__} has migrated it, {copy} is as it was"


def refuse_older(uri: str) -> None:
    """Refuse (UserError) a data base of an older MLflow: others may use it, and there is no file to copy."""
    if (revision := older_revision(uri)) is not None:
        raise UserError(f"its tables are of an older MLflow ({revision}); make a copy, then: mlflow db upgrade URI")


def older_revision(uri: str) -> str | None:
    """The revision of a store's tables where it is one of an older MLflow.

    None where they are up to date, not there yet, or of a newer MLflow, which this one leaves as they are.
    """
    import mlflow
    from mlflow.store.db.utils import _get_latest_schema_revision, _get_schema_version, create_sqlalchemy_engine

    engine = create_sqlalchemy_engine(uri)
    try:
        revision: str | None = _get_schema_version(engine)
    finally:
        engine.dispose()
    versions = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    known = revision is not None and any(versions.glob(f"{revision}_*.py"))
    return revision if known and revision != _get_latest_schema_revision() else None


def _copy(database: Path, copy: Path) -> None:
    """A whole copy, whatever other processes are writing."""
    with contextlib.closing(sqlite3.connect(database)) as source, contextlib.closing(sqlite3.connect(copy)) as target:
        source.backup(target)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock, which ends with its process."""
    with lock.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield
        lock.unlink(missing_ok=True)  # who waited for it removes it, too
