"""When the ranks ask each other whether to stop: by time, and yet at the same steps."""

import time

import torch

from nldist.dist.stop import REQUEST, Stop
from nldist.dist.world import World

_GROWTH = 2  # the next interval is at most so many times the last one


class StopCheck:
    """The stop checks of one pass, about every `every_seconds`.

    A check is a collective, so all ranks must make it after the same step, though no two clocks agree. With each check
    they agree on the next one, too: as many steps on as fit into `every_seconds` at the slowest rank's pace (since the
    last check, or that of its last step where that is slower), but at most twice as many as the last time. A pass
    begins with one step: no step before it tells its pace, and on a GPU the first ones return before they are done.
    So while steps keep their pace the ranks notice a request within `every_seconds` or one step; where they become
    slower, once, after as many of the slow ones as there were to be quick ones.

    Args:
        world: the ranks.
        every_seconds: between two checks; steps that take longer are checked one by one.
        start_step: steps of this pass that were done before.
    """

    def __init__(self, world: World, every_seconds: float, start_step: int = 0) -> None:
        self._world, self._every = world, every_seconds
        self._next = start_step + 1
        self._asked = self._seen = (start_step, time.monotonic())

    def due(self, num_done: int) -> Stop:
        """After `num_done` steps of the pass: what any rank was asked to do, where a check is due; else NONE.

        A collective where one is due: all ranks call it after the same steps, though not after each.
        """
        before, self._seen = self._seen, (num_done, time.monotonic())
        if num_done < self._next:
            return Stop.NONE
        pace = max(self._pace_since(before), self._pace_since(self._asked))
        agreed = self._world.all_reduce(torch.tensor([float(REQUEST.kind), pace], dtype=torch.float64), "max")
        kind, pace = agreed.tolist()
        most = _GROWTH * (num_done - self._asked[0])
        self._next = num_done + (max(1, int(self._every / pace)) if pace * most > self._every else most)
        self._asked = self._seen
        return Stop(int(kind))

    def _pace_since(self, mark: tuple[int, float]) -> float:
        """Seconds per step since a (step, time)."""
        return (self._seen[1] - mark[1]) / (self._seen[0] - mark[0])
