"""ELR, early-learning regularisation (Liu, Niles-Weed, Razavian, Fernandez-Granda; NeurIPS 2020): docs/baselines.md."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.passes.base import Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase, Verdicts
from nldist.passes.soft import soft_rows, soft_verdicts
from nldist.passes.supervised import Step, SupervisedPass
from nldist.passes.sweep import TAU, label_quality

_LEAST = 1e-4  # probability; the authors' code clips there, which also keeps the logarithm finite


class ELR(Method):
    """One network. What it said of each sample early on, averaged, keeps it from learning the wrong labels later."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.method.elr
        self.targets = soft_rows(context, "targets")

    def phases(self) -> list[Phase]:
        """See Method."""
        return [Phase("train", self.context.recipe.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, self._loss, after=self._measure)]

    def _loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """Equation 6: cross-entropy + lambda / n sum_i log(1 - <p_i, t_i>)."""
        (logits,) = engine.forward((step.images, "classify"))
        probabilities = logits.softmax(1).clamp(_LEAST, 1 - _LEAST)
        targets = self._follow(step.ids, probabilities.detach())
        regulariser = (1 - (targets * probabilities).sum(1)).log().mean()
        cross_entropy = F.cross_entropy(logits, step.labels)
        loss = cross_entropy + self.settings.lambda_elr * regulariser
        return {"loss": loss, "cross_entropy": cross_entropy, "regulariser": regulariser}

    def _follow(self, ids: Tensor, probabilities: Tensor) -> Tensor:
        """Section 4.2, temporal ensembling: t = beta t + (1 - beta) p, from t = 0 on."""
        beta = self.settings.beta
        before = self.targets[ids].to(probabilities.dtype)
        targets = beta * before + (1 - beta) * F.normalize(probabilities, p=1, dim=1)
        self.targets[ids] = targets
        return targets

    def _measure(self) -> Metrics:
        """How well the targets tell which given labels are right. A collective."""
        return label_quality(self.context, self.verdicts().clean_probability, TAU)

    def verdicts(self) -> Verdicts:
        """See Method: the targets are the network's averaged opinion of each sample."""
        return soft_verdicts(self.context, self.targets.rows)
