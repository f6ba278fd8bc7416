"""Real gloo processes for distributed tests: one pool per world size, kept for the whole test session."""

import atexit
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from nldist.dist.world import World

# Every process of a test is forked from one that has imported torch and nldist: importing takes seconds, forking none.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("nldist.train.stages", "nldist.train.evaluate", "nldist.launch.checks", "nldist.launch.submit"),
        *("nldist.methods.scanmix", "nldist.methods.mixnn", "nldist.report.compare"),
        "nldist.estimate.scan",
        *("torch._dynamo", "scipy.optimize", "pandas", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    ]
)
_POOLS: dict[int, list[tuple[BaseProcess, Connection]]] = {}
TIMEOUT_SECONDS = 180


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Run `function(world, *args)` on `world_size` gloo ranks and return their results in rank order.

    `function` must be importable (module level). A rank that raises fails the call with its own traceback
    and ends the pool, because the other ranks may be waiting in a collective.
    """
    pool = _POOLS.get(world_size) or _start(world_size)
    for _, pipe in pool:
        pipe.send((function, args))
    answers = []
    for rank, (_, pipe) in enumerate(pool):
        if not pipe.poll(TIMEOUT_SECONDS):
            _stop(world_size)
            raise TimeoutError(f"rank {rank} of {world_size} gave no answer in {TIMEOUT_SECONDS} s")
        answers.append(pipe.recv())
        if answers[-1][0] == "error":
            _stop(world_size)
            raise AssertionError(f"rank {rank} of {world_size} failed:\n{answers[-1][1]}")
    return [value for _, value in answers]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(world_size: int) -> list[tuple[BaseProcess, Connection]]:
    port = free_port()
    pool: list[tuple[BaseProcess, Connection]] = []
    for rank in range(world_size):
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(there, rank, world_size, port), daemon=False)
        process.start()
        pool.append((process, here))
    _POOLS[world_size] = pool
    return pool


def _stop(world_size: int) -> None:
    for process, _ in _POOLS.pop(world_size, []):
        process.kill()
        process.join()


def _serve(pipe: Connection, rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",
    )
    # A rank that torchrun starts forks its data workers; from a fork server each would import all anew.
    multiprocessing.set_start_method("fork", force=True)
    with World.start(num_threads=1) as world:
        while True:
            try:
                function, args = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(("ok", function(world, *args)))
            except BaseException:
                pipe.send(("error", traceback.format_exc()))
                return


@atexit.register
def _stop_all() -> None:
    for world_size in list(_POOLS):
        _stop(world_size)
