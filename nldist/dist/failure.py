"""How a rank among several ends on an error: the first failure is told in full, the others name it."""

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


def end_failed(error: BaseException, rank: int, size: int) -> NoReturn:
    """Report `error` as rank `rank`'s, or name the rank whose failure caused it, and end the process."""
    first = _first_failure(f"rank {rank} on {socket.gethostname()}: {one_line(error)}")
    told = first is not None and first.endswith(one_line(error))
    if first is not None and isinstance(error, RuntimeError):
        print(f"rank {rank} stops because of {first}", file=sys.stderr, flush=True)
    elif isinstance(error, UserError):
        note_refusal()
        if not told:
            print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        text = "".join(traceback.format_exception(error))
        print(f"rank {rank} of {size} failed:\n{text}", file=sys.stderr, flush=True)
    if rank == 0:
        # This rank may hold the store: let the others read who failed first.
        time.sleep(_LINGER_SECONDS)
    # Not sys.exit: worker processes and a half-broken process group could keep the interpreter alive.
    os._exit(2 if isinstance(error, UserError) else 1)


def _first_failure(mine: str) -> str | None:
    """Publish this rank's failure; return another rank's where one was published before."""
    try:
        store = dist.distributed_c10d._get_default_store()
        first = store.compare_set(_KEY, "", mine).decode()
    except Exception:  # the store died with its rank: nothing is known, so report our own error in full
        return None
    return None if first == mine else first
