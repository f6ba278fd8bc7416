"""A pass: a run over one plan, part of an epoch. The trainer knows only passes and the phases that list them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from nldist.data.plan import Plan
from nldist.data.stream import Batch
from nldist.dist.engine import Engine
from nldist.estimate.mixture import Mixture
from nldist.passes.context import Context

Batches = Mapping[str, Batch]
Metrics = dict[str, Any]


class Pass(ABC):
    """A run over one plan: part of an epoch. A resumed pass is built anew and asked for its later steps.

    So `plan` may depend on nothing that the pass itself changes.
    """

    split: str = "train"  # or "evaluation", "test"
    trains: ClassVar[bool] = True
    any_world: ClassVar[bool] = (
        False  # whether other numbers of ranks can go on within it: steps and state are the same
    )
    name: str
    batch: dict[str, int]  # role -> samples per step and rank, at most
    num_samples: int  # that the first role has in all, at most
    num_rows: int = 0  # images in the forward with gradient, per step and rank

    @abstractmethod
    def plan(self) -> Plan:
        """The plan of this pass, from the state at its start."""

    @abstractmethod
    def start(self, num_steps: int, start_step: int) -> None:
        """Get ready for step `start_step` of `num_steps`."""

    def usable(self, batches: Batches) -> bool:
        """Whether a training step can be made of what could be read: by default, of any image of the first role."""
        return len(next(iter(batches.values()))) > 0

    @abstractmethod
    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """Do one step; return scalar tensors to be averaged for the log."""

    def resume_step(self, num_done: int) -> int | None:
        """Where a checkpoint taken now, after `num_done` steps, would go on; None where none can be taken."""
        return num_done

    def sync(self) -> None:  # noqa: B027
        """Bring to the table or the disk what the pass itself has found: a checkpoint is about to be taken."""

    @abstractmethod
    def finish(self) -> Metrics:
        """Complete the pass; return metrics that hold for all ranks; rank 0 may have more, to report. A collective."""

    def splits(self) -> dict[str, "Split"]:
        """The divisions into clean and noisy that the finished pass made, by network."""
        return {}

    def curves(self) -> dict[str, "Curves"]:
        """Plots of the finished pass, by name."""
        return {}


class EnginePass(Pass):
    """A pass that trains one network."""

    def __init__(self, context: Context, number: int, engine: Engine, epoch: int) -> None:
        self.context, self.number, self.engine, self.epoch = context, number, engine, epoch
        self.name = f"net{number}"

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        self._num_steps = num_steps
        self.engine.start_pass(num_steps, start_step)

    def resume_step(self, num_done: int) -> int | None:
        """See Pass."""
        return num_done if self.engine.at_edge else None

    def progress(self, step: int) -> float:
        """The epoch as a fraction: 3.5 is halfway through epoch 3."""
        return self.epoch + step / self._num_steps

    def descend(self, loss: Tensor, step: int) -> None:
        """One optimiser step from `loss` at the scheduled learning rate."""
        self.engine.step(loss, self.context.learning_rate(self.progress(step)))

    def finish(self) -> Metrics:
        """See Pass."""
        self.engine.finish_pass()
        return {}


@dataclass(frozen=True)
class Split:
    """A division of this rank's samples into clean and noisy.

    Attributes:
        losses: (owned,) normalised, NaN where not seen.
        clean_probability: (owned,) of the given labels, NaN where not seen.
        mixture: of the losses; None where there is none.
        tau: a sample counts as clean above this probability.
        labels: (owned,) that the losses are of; None: the given ones.
    """

    losses: np.ndarray
    clean_probability: np.ndarray
    mixture: Mixture | None
    tau: float
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Curves:
    """Lines for a plot: what the axes mean, and each line's points (x, y)."""

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, tuple[list[float], list[float]]]
