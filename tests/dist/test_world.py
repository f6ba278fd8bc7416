import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nldist.dist.stop import REQUEST, Stop
from nldist.dist.stop_check import StopCheck
from nldist.dist.world import World
from nldist.errors import REFUSAL_VARIABLE
from tests.conftest import REPOSITORY
from tests.ranks import free_port, run_ranks


def gather_uneven(world: World) -> tuple[np.ndarray, np.ndarray]:
    rows = np.full((world.rank, 2), world.rank, np.int16)  # rank 0 has none
    return world.all_gather(rows), world.all_gather(np.array([world.rank], np.float64))


def test_all_gather_keeps_order_dtype_and_uneven_lengths() -> None:
    for rows, ranks in run_ranks(gather_uneven, 4):
        assert rows.dtype == np.int16
        assert rows.tolist() == [[1, 1]] + [[2, 2]] * 2 + [[3, 3]] * 3
        assert ranks.tolist() == [0, 1, 2, 3]


def reduce_all(world: World) -> tuple[list[float], object]:
    value = torch.tensor([float(world.rank + 1)], dtype=torch.float64)
    results = [world.all_reduce(value.clone(), op).item() for op in ("sum", "min", "max")]  # type: ignore[arg-type]
    return results, world.broadcast_object({"from": world.rank})


def test_a_seed_gives_the_numbers_of_torch_s_own() -> None:
    for seed in (0, 7, 2**64 - 1):
        torch.manual_seed(seed)
        expected = torch.rand(4)
        World.single().seed(seed)
        torch.testing.assert_close(torch.rand(4), expected, rtol=0, atol=0)


def test_reductions_and_broadcast() -> None:
    assert run_ranks(reduce_all, 3) == [([6.0, 1.0, 3.0], {"from": 0})] * 3


def stop_one(world: World, victim: int, numbers: list[int]) -> list[Stop]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    REQUEST.listen()
    check = StopCheck(world, 0.0)
    answers = [check.due(1)]
    for num_done, number in enumerate(numbers, start=2):
        if world.rank == victim:
            os.kill(os.getpid(), number)
        answers.append(check.due(num_done))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    REQUEST.kind, REQUEST.since = Stop.NONE, None
    return answers


@pytest.mark.parametrize("victim", [0, 2])
def test_a_signal_to_one_rank_stops_all_at_the_same_edge(victim: int) -> None:
    numbers = [signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR2]
    assert run_ranks(stop_one, 3, victim, numbers) == [[Stop.NONE, Stop.REQUEUE, Stop.END, Stop.END]] * 3


SCRIPT = """
import sys, time
from nldist.dist.world import World
from nldist.errors import UserError
kind, victim = sys.argv[1], int(sys.argv[2])
with World.start(num_threads=1, timeout_seconds=60, device="cpu") as world:
    if world.rank == victim or kind == "same":
        raise (ValueError if kind == "bug" else UserError)("this is what was wrong")
    world.barrier()
    time.sleep(100)
"""


def fail(kind: str, victim: int, tmp_path: Path) -> tuple[list[int], list[str]]:
    """Three ranks, of which one (or all) fails; exit codes and what each wrote to stderr."""
    (tmp_path / "script.py").write_text(SCRIPT)
    shared = os.environ | {
        REFUSAL_VARIABLE: str(tmp_path / "refused"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "3",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py"), kind, str(victim)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"},
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    return [process.returncode for process in ranks], errors


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_s_bug_is_shown_in_full_by_that_rank_alone(victim: int, tmp_path: Path) -> None:
    codes, errors = fail("bug", victim, tmp_path)
    assert codes == [1, 1, 1]
    assert f"rank {victim} of 3 failed" in errors[victim]
    assert "ValueError: this is what was wrong" in errors[victim]
    assert "Traceback" in errors[victim]
    for rank in {0, 1, 2} - {victim}:
        assert errors[rank].strip().startswith(f"rank {rank} stops because of rank {victim}")
        assert "ValueError: this is what was wrong" in errors[rank]
        assert "Traceback" not in errors[rank]
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("victim", [0, 2])
def test_what_one_rank_refuses_ends_all_with_one_line_each(victim: int, tmp_path: Path) -> None:
    codes, errors = fail("refusal", victim, tmp_path)
    assert codes == [2, 2, 2]
    assert [text.count("this is what was wrong") for text in errors] == [1, 1, 1]
    assert not any("Traceback" in text for text in errors)
    assert errors[victim].strip() == "error: this is what was wrong"


def test_an_error_that_all_ranks_meet_is_told_once(tmp_path: Path) -> None:
    codes, errors = fail("same", 0, tmp_path)
    assert codes == [2, 2, 2]
    assert sum(text.count("error: this is what was wrong") for text in errors) == 1
    assert (tmp_path / "refused").exists()
