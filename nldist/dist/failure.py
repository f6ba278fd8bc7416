"""How a rank among several ends on an error: the first failure is told in full, the others name it and end alike."""

import contextlib
import os
import socket
import sys
import time
import traceback
from typing import NoReturn

import torch.distributed as dist

from nldist.errors import UserError, note_refusal, one_line

_KEY = "nldist/failure"
_LINGER_SECONDS = 3
_NETWORK = (socket.AF_INET, socket.AF_INET6)


def end_failed(error: BaseException, rank: int, size: int) -> NoReturn:
    """Report `error` as rank `rank`'s, or name the rank whose failure caused it, and end the process."""
    first = _first_failure(f"rank {rank} on {socket.gethostname()}: {one_line(error)}")
    told = first is not None and first.endswith(one_line(error))
    code = 2 if isinstance(error, UserError) else 1
    if first is not None and isinstance(error, RuntimeError):
        print(f"rank {rank} stops because of {first}", file=sys.stderr, flush=True)
        code = 2 if f": {UserError.__name__}: " in first else 1
    elif isinstance(error, UserError):
        note_refusal()
        if not told:
            print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        text = "".join(traceback.format_exception(error))
        print(f"rank {rank} of {size} failed:\n{text}", file=sys.stderr, flush=True)
    if rank == 0:
        # This rank may hold the store: let the others, whose collectives fail now, read there who failed first.
        _end_connections(keep=int(os.environ["MASTER_PORT"]))
        time.sleep(_LINGER_SECONDS)
    # Not sys.exit: worker processes and a half-broken process group could keep the interpreter alive.
    os._exit(code)


def _end_connections(keep: int) -> None:
    """End this process's connections, but those of the port `keep`: gloo's last until the process has ended."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError, ValueError, IndexError), socket.socket(fileno=os.dup(descriptor)) as one:
            if one.family in _NETWORK and keep not in (one.getsockname()[1], one.getpeername()[1]):
                one.shutdown(socket.SHUT_RDWR)


def _first_failure(mine: str) -> str | None:
    """Publish this rank's failure; return another rank's where one was published before."""
    try:
        store = dist.distributed_c10d._get_default_store()
        first = store.compare_set(_KEY, "", mine).decode()
    except Exception:  # the store died with its rank: nothing is known, so report our own error in full
        return None
    return None if first == mine else first
