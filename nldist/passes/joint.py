"""The pass of methods that train several networks in one step, on the same batch."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from nldist.dist.engine import Engine
from nldist.passes.base import Batches, Metrics
from nldist.passes.context import Context
from nldist.passes.supervised import Step, SupervisedPass

# "loss0" for the first network, "loss1" for the second and so on; and whatever else is to be in the log by its name.
JointLoss = Callable[[Sequence[Engine], Step], Mapping[str, Tensor]]


class JointPass(SupervisedPass):
    """One epoch over all samples with a loss for each of several networks.

    All ranks step the networks in one order, each from a loss that every rank has in every step: a rank that selected
    no sample has a loss of 0 that still leads back to the network.
    """

    def __init__(self, context: Context, engines: Sequence[Engine], epoch: int, loss: JointLoss) -> None:
        super().__init__(context, 0, engines[0], epoch, lambda _, step: loss(engines, step))
        self.engines, self.name = engines, "joint"
        self.num_rows = len(engines) * self.batch["all"]  # all networks' forwards wait for their backwards

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        super().start(num_steps, start_step)
        for engine in self.engines[1:]:
            engine.start_pass(num_steps, start_step)

    def resume_step(self, num_done: int) -> int | None:
        """See Pass."""
        return num_done if all(engine.at_edge for engine in self.engines) else None

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        values = self.values(batches["all"], step)
        rate = self.rate(self.progress(step))
        for number, engine in enumerate(self.engines):
            engine.step(values[f"loss{number}"], rate)
        return {name: value.detach() for name, value in values.items()}

    def finish(self) -> Metrics:
        """See Pass."""
        for engine in self.engines[1:]:
            engine.finish_pass()
        return super().finish()
