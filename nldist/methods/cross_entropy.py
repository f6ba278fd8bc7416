"""Plain cross-entropy on the given labels: the baseline."""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.passes.base import Pass
from nldist.passes.method import Method, Phase
from nldist.passes.supervised import Step, SupervisedPass


class CrossEntropy(Method):
    """One network, one loss."""

    def phases(self) -> list[Phase]:
        """See Method."""
        return [Phase("train", self.context.recipe.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, cross_entropy)]


def cross_entropy(engine: Engine, step: Step) -> Mapping[str, Tensor]:
    """Mean cross-entropy of one batch with its labels."""
    (logits,) = engine.forward((step.images, "classify"))
    return {"loss": F.cross_entropy(logits, step.labels)}
