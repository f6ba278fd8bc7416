"""A lock that one process of one command holds, or some that share it, on any node that sees the file."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from nldist.errors import UserError


@contextmanager
def locked(path: Path, in_use: str | None = None, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, alone or `shared` with others that share it.

    Where another process holds it: wait, or refuse with the message `in_use`. Who was alone removes the file.

    Raises:
        UserError: it is in use, or its directory cannot be written or its file system has no locks.
    """
    try:
        file = _taken(path, in_use, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError as error:
        why = f"{error.strerror}; the file system must be writable and have locks"
        raise UserError(f"cannot lock {path}: {why}") from None
    try:
        yield
    finally:
        if not shared:
            path.unlink(missing_ok=True)  # before the lock is free: who waits for it then sees that the file is another
        file.close()


def _taken(path: Path, in_use: str | None, kind: int) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("w+")
        try:
            # Not flock, which forked processes would inherit.
            fcntl.lockf(file, kind | (fcntl.LOCK_NB if in_use else 0))
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except OSError as error:
            if in_use and error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(in_use) from None
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
        file.close()  # who held the lock has removed the file meanwhile
