"""SELC (Lu and He, IJCAI 2022, arXiv 2205.01156): labels corrected by an ensemble of predictions: docs/selc.md."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.losses import soft_cross_entropy
from nldist.methods.cross_entropy import cross_entropy
from nldist.passes.base import Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase, Verdicts
from nldist.passes.soft import accuracy, soft_labels, soft_verdicts, update
from nldist.passes.supervised import Step, SupervisedPass
from nldist.passes.sweep import TAU, label_quality


class SELC(Method):
    """One network; until it begins to fit wrong labels it learns the given ones, then their moving average."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.method.selc
        self.population = context.subset(self.settings.subset)
        self.soft = soft_labels(context, "soft")
        self.seen = context.table.add("seen", torch.bool, on="device")

    def phases(self) -> list[Phase]:
        """See Method."""
        turning = self.settings.turning_epoch
        rest = self.context.recipe.epochs - turning
        return [Phase("given", turning, self._given), Phase("correct", rest, self._correct)]

    def _given(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, cross_entropy, population=self.population)]

    def _correct(self, epoch: int) -> list[Pass]:
        return [
            SupervisedPass(
                *(self.context, 0, self.engines[0], epoch, self.loss), population=self.population, after=self.measure
            )
        ]

    def loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """Move the soft labels by this prediction, then learn them: the update comes before the use."""
        (logits,) = engine.forward((step.images, "classify"))
        targets = update(self.soft, step.ids, logits, self.settings.momentum)
        self.seen[step.ids] = torch.ones_like(step.ids)
        return {"loss": soft_cross_entropy(logits, targets)}

    def measure(self) -> Metrics:
        """How good the soft labels are, and how well they tell which given labels are right. A collective."""
        found = accuracy(self.context, self.soft, self.population)
        return found | label_quality(self.context, self._judge().clean_probability, TAU)

    def _judge(self) -> Verdicts:
        """The given labels' shares of the soft ones, and the classes that these are largest for."""
        return soft_verdicts(self.context, self.soft.rows, self.seen.rows)

    def verdicts(self) -> Verdicts | None:
        """The soft labels; with a subset None: they are not those of every sample."""
        return self._judge() if self.population is None else None
