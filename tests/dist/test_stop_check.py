"""Stop checks over real processes whose clocks, set by the test, run at different paces."""

import itertools
import time
from collections.abc import Callable, Sequence

import pytest

from nldist.dist.stop import REQUEST, Stop
from nldist.dist.stop_check import StopCheck
from nldist.dist.world import World
from tests.ranks import run_ranks

EVERY = 2.0
# Seconds of a rank's step after so many steps of the pass; another one for each rank.
Pace = Callable[[int, int], float]


def steady(rank: int, step: int) -> float:
    return (1 / 256, 1 / 64, 1 / 128)[rank]


def slow(rank: int, step: int) -> float:
    return 30.0


def late(rank: int, step: int) -> float:
    """As on a GPU: the first steps are queued, then each waits for one that is done."""
    return 1 / 1024 if step < 50 else 0.5


def unsteady(rank: int, step: int) -> float:
    return (0.01, 0.3, 5.0)[(step // 40 + rank) % 3]


def run_pass(
    world: World, pace: Pace, steps: Sequence[int], request: tuple[int, int] = (0, -1)
) -> tuple[list[int], list[float], tuple[int, Stop]]:
    """Go through `steps`; rank `request[0]` is asked to end within step `request[1]`.

    Returns the steps after which this rank took part in a check, its time then, and where it stopped with what.
    """
    clock, asked, times, stopped = 0.0, [], [], (-1, Stop.NONE)
    before = world.sent_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: clock)
        check, at_edge = StopCheck(world, EVERY, steps[0] - 1), set(steps)
        for step in range(steps[0], steps[-1] + 1):
            clock += pace(world.rank, step)
            if (world.rank, step) == request:
                patch.setattr(REQUEST, "kind", Stop.END)
            stop = check.due(step) if step in at_edge else Stop.NONE
            if world.sent_bytes > before:
                asked.append(step)
                times.append(clock)
                before = world.sent_bytes
            if stop:
                stopped = step, stop
                break
    return asked, times, stopped


@pytest.mark.parametrize("pace", [steady, slow, late, unsteady])
@pytest.mark.parametrize("steps", [range(1, 1501), range(701, 1501), range(4, 1501, 4)])
def test_all_ranks_ask_at_the_same_steps(pace: Pace, steps: range) -> None:
    answers = run_ranks(run_pass, 3, pace, steps)
    assert answers[0][0][0] == steps[0]
    assert len(answers[0][0]) > 3
    assert [asked for asked, _, _ in answers] == [answers[0][0]] * 3
    assert all(stopped == (-1, Stop.NONE) for _, _, stopped in answers)


def test_checks_are_as_far_apart_as_the_slowest_rank_s_steps_allow() -> None:
    asked, _, _ = run_ranks(run_pass, 3, steady, range(1, 1501))[0]
    assert asked[:8] == [1, 3, 7, 15, 31, 63, 127, 255], "twice as far each time, up to 128 steps of 1/64 s"
    assert {after - before for before, after in itertools.pairwise(asked[7:])} == {128}


def test_long_steps_are_checked_one_by_one() -> None:
    assert run_ranks(run_pass, 3, slow, range(5, 21))[1][0] == list(range(5, 21))


def test_steps_that_become_slower_are_noticed_within_twice_the_quick_ones() -> None:
    """Before the slow ones the checks were 1, 2, 4 ... steps apart: none lies further on than that."""
    asked, times, _ = run_ranks(run_pass, 3, late, range(1, 301))[2]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    first_slow = next(place for place, step in enumerate(asked) if step >= 50)
    assert asked[first_slow] <= 2 * 50
    assert max(gaps[first_slow:]) <= EVERY
    assert min(gaps[first_slow + 1 : -1]) > EVERY / 2, "nor are they asked more often than wanted"


@pytest.mark.parametrize("victim", [0, 2])
def test_a_request_to_one_rank_stops_all_at_the_same_step(victim: int) -> None:
    answers = run_ranks(run_pass, 3, steady, range(1, 1501), (victim, 1000))
    assert [stopped for _, _, stopped in answers] == [answers[0][2]] * 3
    step, stop = answers[0][2]
    assert stop == Stop.END
    assert 1000 <= step < 1128, "within two seconds of the slowest rank's steps"


def test_one_rank_alone_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    check = StopCheck(World.single(), EVERY)
    assert check.due(1) == Stop.NONE
    monkeypatch.setattr(REQUEST, "kind", Stop.REQUEUE)
    assert [check.due(step) for step in (2, 3)] == [Stop.NONE, Stop.REQUEUE]
