"""Whole training jobs as real processes, one per rank, that a test can kill at a chosen step."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from nldist.train.loop import Trainer
from tests.ranks import CONTEXT, free_port

DIGITS = Path(__file__).parent / "digits.yaml"
TIMEOUT_SECONDS = 240


def run_job(
    run_dir: Path,
    *overrides: str,
    world_size: int = 1,
    kill: tuple[int, int] | None = None,
    stop: tuple[int, int] | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[int | None]:
    """Train tests/digits.yaml with overrides; returns each rank's exit code (negative: the signal that ended it).

    Each rank calls `prepare` first, which must stand at the top of a module.

    `kill=(rank, n)` ends that rank by SIGKILL after its n-th step; `stop=(rank, n)` sends it
    and its data workers SIGTERM then, as torchrun and Slurm do.
    """
    arguments = [str(DIGITS), f"run.dir={run_dir}", "dist.num_threads=1", "dist.device=cpu", "track.enabled=false"]
    port = free_port()
    processes = [
        CONTEXT.Process(
            target=_run_rank, args=(rank, world_size, port, [*arguments, *overrides], run_dir, kill, stop, prepare)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_SECONDS)
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hanging, f"ranks {hanging} of {world_size} hang"
    return [process.exitcode for process in processes]


def output(run_dir: Path, rank: int = 0) -> str:
    """All that a rank of the jobs in `run_dir` has printed."""
    return run_dir.with_name(f"{run_dir.name}.rank{rank}.log").read_text()


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    arguments: list[str],
    run_dir: Path,
    kill: tuple[int, int] | None,
    stop: tuple[int, int] | None,
    prepare: Callable[[], None] | None,
) -> None:
    os.setpgid(0, 0)
    log = run_dir.with_name(f"{run_dir.name}.rank{rank}.log").open("a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    multiprocessing.set_start_method("fork", force=True)
    for request, number in ((kill, signal.SIGKILL), (stop, signal.SIGTERM)):
        if request is not None and request[0] == rank:
            _signal_after(request[1], number)
    if prepare is not None:
        prepare()
    from nldist.cli import main

    sys.exit(main(["train", *arguments]))


def _signal_after(num_steps: int, number: signal.Signals) -> None:
    """Send this process and its workers a signal when it has done `num_steps` steps of any pass."""
    original, done = Trainer._continue_after, 0

    def counting(self: Trainer, *arguments: object) -> bool:
        nonlocal done
        done += 1
        if done == num_steps:
            os.killpg(0, number)
        return original(self, *arguments)  # type: ignore[arg-type]

    Trainer._continue_after = counting  # type: ignore[method-assign,assignment]
