"""What goes wrong on one rank is known to all, so that all do the same about it."""

from collections.abc import Callable

import numpy as np

from nldist.dist.world import World
from nldist.errors import UserError


def every_line(text: str, world: World) -> list[str]:
    """Every rank's text, each as one line, in rank order. A collective."""
    line = " ".join(text.split()) + "\n"
    everyone = world.all_gather(np.frombuffer(line.encode(), np.uint8).copy())
    return everyone.tobytes().decode().split("\n")[:-1]


def first_problem(problem: str | None, world: World) -> str | None:
    """The problem of the first rank that has one, the same on every rank; None where none has. A collective."""
    found = [(rank, line) for rank, line in enumerate(every_line(problem or "", world)) if line]
    if not found:
        return None
    return f"rank {found[0][0]}: {found[0][1]}" if world.size > 1 else found[0][1]


def on_all(work: Callable[[], None], world: World, what_fails: str) -> None:
    """Do `work`, which writes files, on every rank. A collective.

    Raises:
        UserError: the file system refused it on some rank (full disk, no permission).
    """
    problem = None
    try:
        work()
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        problem = str(error)
    if problem := first_problem(problem, world):
        raise UserError(f"{what_fails}: {problem}; free some space, or see to its permissions")
