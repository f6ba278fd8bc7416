"""mixup (Zhang et al., ICLR 2018): cross-entropy on convex combinations of pairs within the batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.losses import mix, one_hot, soft_cross_entropy
from nldist.passes.base import Pass
from nldist.passes.method import Method, Phase
from nldist.passes.supervised import Step, SupervisedPass


class Mixup(Method):
    """One network; one mixing weight per step, as in the authors' code."""

    def phases(self) -> list[Phase]:
        """See Method."""
        return [Phase("train", self.context.recipe.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, self._loss)]

    def _loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        targets = one_hot(step.labels, self.context.train.num_classes)
        return {"loss": mixed_cross_entropy(engine, step, targets, self.context.config.method.mixup.alpha)[0]}


def mixed_cross_entropy(engine: Engine, step: Step, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the mixed images with the mixed targets, both mixed from (b, ...), and the logits (b, C)."""
    num_rows, weight = len(step.images), float(step.random.beta(alpha, alpha))
    permutation = torch.from_numpy(step.random.permutation(num_rows)).to(step.images.device)
    (logits,) = engine.forward((mix(step.images, permutation, weight, num_rows), "classify"))
    return soft_cross_entropy(logits, mix(targets, permutation, weight, num_rows)), logits
