"""Errors that a user can act on, and how entry points report them."""

import contextlib
import errno
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")
EXIT_REFUSED = 2  # as argparse's: something that the user can put right
EXIT_PIPE = 141  # as a shell tells of SIGPIPE
REFUSAL_VARIABLE = "NLDIST_REFUSAL"


class UserError(Exception):
    """Something that the user can put right: the message says what is wrong, where, and what to do."""


def note_refusal() -> None:
    """Leave the file that $NLDIST_REFUSAL names, if it is set: that the user has something to put right.

    For where a rank's exit code is lost, because others are killed.
    """
    if path := os.environ.get(REFUSAL_VARIABLE):
        with contextlib.suppress(OSError):  # such as the full disk that is to be told of
            Path(path).touch()


def known(error: BaseException) -> BaseException:
    """A full disk, wherever it is met, as a `UserError`; any other error as it is."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "a file of the run"
        return UserError(f"{where}: {error.strerror}; free some space, then the same command goes on")
    return error


class _Lines(logging.Handler):
    """To what is stdout now: tests and launchers replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def show_messages(is_main: bool) -> None:
    """Print what nldist's modules have to tell as lines: on rank 0 all of it, on others what is a warning."""
    logger = logging.getLogger("nldist")
    if not logger.handlers:
        logger.addHandler(_Lines())
    logger.setLevel(logging.INFO if is_main else logging.WARNING)


def one_line(error: BaseException) -> str:
    """An error's kind and message as one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def main_guard(main: Callable[P, int | None]) -> Callable[P, int]:
    """Make an entry point report a `UserError` as one line on stderr and exit code 2, without a traceback.

    Of several ranks on a node, which meet the same error before they have joined, the first one speaks.
    """

    @functools.wraps(main)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            # Whoever read the output, such as head, has enough; nor may the interpreter flush it at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE
        except (UserError, OSError) as raised:
            error = known(raised)
            if not isinstance(error, UserError):
                raise
            note_refusal()
            if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
                print(f"error: {error}", file=sys.stderr)
            return EXIT_REFUSED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded
