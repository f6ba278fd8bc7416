"""Plain cross-entropy on the given labels: the baseline."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.passes.base import Pass
from nldist.passes.method import Method, Phase
from nldist.passes.supervised import SupervisedPass


class CrossEntropy(Method):
    """One network, one loss."""

    def phases(self) -> list[Phase]:
        """See Method."""
        return [Phase("train", self.context.config.train.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, cross_entropy)]


def cross_entropy(engine: Engine, images: Tensor, labels: Tensor, _generator: np.random.Generator) -> Tensor:
    """Mean cross-entropy of one batch with hard labels (b,)."""
    (logits,) = engine.forward((images, "classify"))
    return F.cross_entropy(logits, labels)
