"""Writing a data set's shards on a cluster: an array of jobs, and one that finishes when all of these have ended."""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import submitit

from nldist.data.make.finish import Summary
from nldist.data.make.lock import locked
from nldist.data.make.parallel import WorkerLostError
from nldist.data.make.writer import SplitWriter
from nldist.dist.stop import EXIT_REQUEUE
from nldist.errors import REFUSAL_VARIABLE, UserError, main_guard
from nldist.files import write_text
from nldist.launch.requeue import refusal
from nldist.launch.settings import ClusterSettings
from nldist.launch.slurm import is_queued
from nldist.launch.submit import executor, queue, sbatch_text

JOBS_FILE, LOCK_FILE = ".jobs.json", ".queueing.lock"  # in the folder of logs
_SHOW_SECONDS = 30.0
Share = list[tuple[SplitWriter, list[int]]]
"""Of each split the shards to be written."""
Job = submitit.Job[int]


@dataclass
class ShardJob:
    """A share of the shards, as submitit's callable. No other job has one of them, so none waits for another."""

    name: str
    share: Share

    def __call__(self) -> int:
        """Write them; ends the process with another exit code than 0."""
        return _run(self._write)

    def _write(self) -> None:
        start = shown = time.monotonic()
        done = 0
        with ExitStack() as held:
            for writer, _ in self.share:
                held.enter_context(writer.build.claimed(shared=True))
            share = [(writer, writer.missing(numbers)) for writer, numbers in self.share]
            total = sum(sum(todo.values()) for _, todo in share)
            for num_images in itertools.chain.from_iterable(writer.write(todo) for writer, todo in share):
                done += num_images
                if time.monotonic() - shown > _SHOW_SECONDS:
                    shown = time.monotonic()
                    print(f"{self.name}: {done:,} of {total:,} images, {done / (shown - start):,.0f}/s", flush=True)
        seconds = time.monotonic() - start
        print(f"{self.name}: {done:,} images, {seconds:.1f} s, {done / seconds:,.0f} images/s", flush=True)


@dataclass
class FinishJob:
    """Index and dataset.json, when all shards are there; `num_images` of them were `queued` to be written (time)."""

    writers: list[SplitWriter]
    num_images: int
    queued: float

    def __call__(self) -> int:
        """Finish all splits; ends the process with another exit code than 0."""
        return _run(self._finish)

    def _finish(self) -> None:
        for writer in self.writers:
            start = time.monotonic()
            with writer.build.claimed():
                summary = writer.resume()
            print(summary.report(writer.build.folder, time.monotonic() - start), flush=True)
        seconds = time.time() - self.queued
        rate = f"{self.num_images / seconds:,.0f} images/s"
        print(f"{self.num_images:,} images, {seconds:.1f} s since they were queued, {rate}", flush=True)


@dataclass(frozen=True)
class Sharding:
    """The writing of a data set on a cluster. `logs` is the folder of the jobs' output."""

    writers: list[SplitWriter]
    logs: Path
    settings: ClusterSettings

    def begin(self) -> list[Summary]:
        """Start or go on; returns the summaries of the splits that are complete.

        Raises:
            UserError: as `write_split`, for any split.
        """
        complete = []
        for writer in list(self.writers):
            found = writer.find()
            with writer.build.claimed():
                summary = writer.begin(found)
            if summary is not None:
                self.writers.remove(writer)
                complete.append(summary)
        return complete

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While jobs are queued nobody else queues some. Raises UserError if earlier ones have not ended."""
        with locked(self.logs / LOCK_FILE, f"{self.logs}: another command is queueing jobs for this data set"):
            file = self.logs / JOBS_FILE
            jobs = [job for job in (json.loads(file.read_text()) if file.exists() else []) if is_queued(job)]
            if jobs:
                names = " ".join(dict.fromkeys(job.partition("_")[0] for job in jobs))
                raise UserError(f"job {', '.join(jobs)} of an earlier start has not ended: wait, or scancel {names}")
            yield

    def submit(self) -> tuple[list[Job], Job]:
        """Queue the jobs: those that write, and the one that finishes when all of these have ended well.

        Raises:
            UserError: Slurm refused.
        """
        todo = [writer.missing() for writer in self.writers]
        shards = [(which, number) for which, missing in enumerate(todo) for number in missing]
        count = min(self.settings.nodes, len(shards))
        jobs = [ShardJob(f"task {k + 1} of {count}", self._share(shards[k::count])) for k in range(count)]
        num_images = sum(sum(missing.values()) for missing in todo)
        settings, name = self.settings.model_copy(update={"nodes": 1}), self.logs.name.removesuffix("-logs")
        queued = queue(executor("slurm", self.logs, name, settings), jobs) if jobs else []
        write_text(self.logs / JOBS_FILE, json.dumps([job.job_id for job in queued]))
        chosen = executor("slurm", self.logs, f"{name}-finish", settings, _after(queued) if queued else None)
        try:
            (finish,) = queue(chosen, [FinishJob(self.writers, num_images, time.time())])
        except UserError as error:
            if not queued:
                raise
            array = queued[0].job_id.partition("_")[0]
            raise UserError(
                f"{error}; the jobs that write shards are queued: scancel {array}, or give it again later"
            ) from None
        write_text(self.logs / JOBS_FILE, json.dumps([job.job_id for job in [*queued, finish]]))
        return queued, finish

    def batch_files(self) -> Iterator[str]:
        """The files that `submit` would give to sbatch, if there are as many shards as nodes."""
        settings, name = self.settings.model_copy(update={"nodes": 1}), self.logs.name.removesuffix("-logs")
        yield sbatch_text(self.settings.nodes, self.logs, name, settings)
        yield sbatch_text(1, self.logs, f"{name}-finish", settings, "afterok:JOB")  # whose number is not known yet

    def _share(self, shards: Sequence[tuple[int, int]]) -> Share:
        """These shards, given as positions of their splits and numbers in them."""
        numbers = [[number for which, number in shards if which == own] for own in range(len(self.writers))]
        return [(writer, own) for writer, own in zip(self.writers, numbers, strict=True) if own]


def _after(jobs: Sequence[Job]) -> str:
    """Slurm's dependency on a job, or on all members of an array."""
    return f"afterok:{jobs[0].job_id.partition('_')[0]}"


def _run(work: Callable[[], None]) -> int:
    """Do it; ends the process with another exit code than 0. `nldist.launch.requeue` decides what follows from it."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, _stop)
    os.environ[REFUSAL_VARIABLE] = str(refusal(submitit.JobEnvironment().paths.folder))
    code = main_guard(_crashing)(work)
    if code != 0:
        raise SystemExit(code)
    return code


def _crashing(work: Callable[[], None]) -> int:
    try:
        work()
    except WorkerLostError as error:  # which is worth another try
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _stop(number: int, _frame: FrameType | None) -> None:
    """Before a time limit or a preemption: whole shards stay, the others are done again."""
    print(f"{signal.Signals(number).name}: finished shards stay", flush=True)
    os._exit(EXIT_REQUEUE)  # at once: the workers notice
