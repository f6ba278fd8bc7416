"""The pass of methods that learn from one label for each sample."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nldist.data.plan import Plan
from nldist.data.stream import Batch
from nldist.data.views import View
from nldist.dist.engine import Engine
from nldist.passes.base import Batches, EnginePass, Metrics
from nldist.passes.context import Context


@dataclass(frozen=True)
class Step:
    """What a paper's step is given.

    Attributes:
        ids: int64 (b,), which samples; on the device.
        labels: int64 (b,), their given labels.
        images: float32 (b, 3, h, w), a random view of them.
        epoch: how far the run is: 3.5 is halfway through epoch 3.
        random: this rank's and step's randomness.
    """

    ids: Tensor
    labels: Tensor
    images: Tensor
    epoch: float
    random: np.random.Generator


# "loss", and whatever else is to be in the log by its name.
Loss = Callable[[Engine, Step], Mapping[str, Tensor]]
Rate = Callable[[float], float]  # the learning rate at a (fractional) epoch


class SupervisedPass(EnginePass):
    """One epoch over all samples with a loss on the given labels, at the scheduled learning rate or another one.

    Args:
        context: of the run.
        number: the network's.
        engine: the network's.
        epoch: in the whole run.
        loss: the paper's step.
        view: random view; None = views.train.
        population: sorted ids; None = all.
        rate: the learning rate; None = the scheduled one.
        after: gives metrics of what the finished epoch came to. A collective.
    """

    def __init__(
        self,
        context: Context,
        number: int,
        engine: Engine,
        epoch: int,
        loss: Loss,
        view: View | None = None,
        population: np.ndarray | None = None,
        after: Callable[[], Metrics] = dict,
        *,
        rate: Rate | None = None,
    ) -> None:
        super().__init__(context, number, engine, epoch)
        self._loss, self._view, self._population, self._after = loss, view, population, after
        self.rate = rate or context.learning_rate
        self.batch = {"all": context.recipe.batch_size}
        self.num_samples = len(context.train) if population is None else len(population)
        self.num_rows = self.batch["all"]

    def plan(self) -> Plan:
        """See Pass."""
        return self.context.shuffled(self.epoch, self.name, self.batch["all"], self._population)

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        values = self.values(batches["all"], step)
        self.engine.step(values["loss"], self.rate(self.progress(step)))
        return {name: value.detach() for name, value in values.items()}

    def values(self, batch: Batch, step: int) -> Mapping[str, Tensor]:
        """The loss, with gradient, and what else it gives."""
        images = self.context.view(batch, self.epoch, self.name, self._view)
        random = self.context.generator(self.name, "step", self.epoch, step, self.context.world.rank)
        return self._loss(self.engine, Step(batch.ids, batch.labels, images, self.progress(step), random))

    def finish(self) -> Metrics:
        """See Pass."""
        return super().finish() | self._after()
