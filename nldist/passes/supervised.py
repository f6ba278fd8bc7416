"""The pass of methods that learn from one label for each sample."""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from nldist.data.plan import Plan
from nldist.data.views import View
from nldist.dist.engine import Engine
from nldist.passes.base import Batches, EnginePass
from nldist.passes.context import Context


class SupervisedPass(EnginePass):
    """One epoch over all samples with a loss on the given labels."""

    def __init__(
        self,
        context: Context,
        number: int,
        engine: Engine,
        epoch: int,
        loss: Callable[[Engine, Tensor, Tensor, np.random.Generator], Tensor],
        view: View | None = None,
    ) -> None:
        super().__init__(context, number, engine, epoch)
        self._loss, self._view = loss, view
        self.batch = {"all": context.config.train.batch_size}
        self.num_samples, self.num_rows = len(context.train), self.batch["all"]

    def plan(self) -> Plan:
        """See Pass."""
        return self.context.shuffled(self.epoch, self.number, self.batch["all"])

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        batch = batches["all"]
        images = self.context.view(batch, self.epoch, self.number, self._view)
        generator = self.context.generator(self.epoch, self.number, step)
        loss = self._loss(self.engine, images, batch.labels, generator)
        self.descend(loss, step)
        return {"loss": loss.detach()}
