"""Independent jobs on several processes that end with their parent, however it dies."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nldist.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerLostError(UserError):
    """A worker process was killed from outside."""


def run_jobs(function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int) -> Iterator[Result]:
    """Yield `function(job)` for every job, as they finish: the order is any.

    Jobs are drawn as workers come free, so neither the parent nor a worker ever holds all of them.
    `num_workers` 0 runs them in this process, in order; so is one job alone, which would wait for a process to start.

    Raises:
        WorkerLostError: a worker process was killed from outside.
        Exception: what a job raises; jobs not yet begun are then dropped.
    """
    first = list(itertools.islice(jobs := iter(jobs), 2))
    jobs = itertools.chain(first, jobs)
    if num_workers == 0 or len(first) < 2:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker)
    try:
        yield from _drain(pool, function, jobs, max_pending=2 * num_workers)
    except BrokenProcessPool:
        raise WorkerLostError(
            "a worker process was killed, perhaps for want of memory: run again with fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _drain(
    pool: ProcessPoolExecutor, function: Callable[[Job], Result], jobs: Iterable[Job], max_pending: int
) -> Iterator[Result]:
    pending: set[Future[Result]] = set()
    for job in jobs:
        pending.add(pool.submit(function, job))
        if len(pending) >= max_pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker of a killed parent would wait for its next job for ever: it holds both ends of the job pipe.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
