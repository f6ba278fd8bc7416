"""PENCIL (Yi and Wu, CVPR 2019): docs/baselines.md."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.methods.cross_entropy import cross_entropy
from nldist.passes.base import Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase, Verdicts
from nldist.passes.soft import soft_labels, soft_verdicts
from nldist.passes.supervised import Loss, Step, SupervisedPass
from nldist.passes.sweep import TAU, label_quality

_K = 10.0  # the paper's: the label of an unchanged sample has e^10 times the weight of each other class


class Pencil(Method):
    """One network and, learnt with it by gradient descent, every sample's label distribution.

    Attributes:
        variables: rows y~ (owned, C); a sample's distribution is y^d = softmax(y~).
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.method.pencil
        self.variables = soft_labels(context, "label_logits", _K)

    def phases(self) -> list[Phase]:
        """The paper's three: backbone learning, label learning, final fine-tuning."""
        settings = self.settings
        rest = self.context.recipe.epochs - settings.warmup_epochs - settings.correction_epochs
        return [
            Phase("backbone", settings.warmup_epochs, lambda epoch: [self._pass(epoch, cross_entropy)]),
            Phase("labels", settings.correction_epochs, self._correct),
            Phase("finetune", rest, self._finetune),
        ]

    def _pass(self, epoch: int, loss: Loss, **options: Any) -> Pass:
        return SupervisedPass(self.context, 0, self.engines[0], epoch, loss, **options)

    def _correct(self, epoch: int) -> list[Pass]:
        return [self._pass(epoch, self._learn_labels, after=self._measure)]

    def _finetune(self, epoch: int) -> list[Pass]:
        return [self._pass(epoch, self._fit_labels, rate=self._finetune_rate, after=self._measure)]

    def _finetune_rate(self, epoch: float) -> float:
        optim = self.context.recipe.optim
        return self.settings.finetune_lr / optim.lr * self.context.learning_rate(epoch)

    def _learn_labels(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """L = L_c / C + alpha L_o + beta L_e / C; and a step of the batch's label variables along it."""
        (logits,) = engine.forward((step.images, "classify"))
        variables = self.variables[step.ids].to(logits.dtype).requires_grad_()
        classification = divergence(logits, variables.log_softmax(1))
        compatibility = F.cross_entropy(variables.softmax(1), step.labels)  # as the authors' code: docs/baselines.md
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).mean()
        loss = classification + self.settings.alpha * compatibility + self.settings.beta * entropy
        (gradient,) = torch.autograd.grad(loss, variables, retain_graph=True)
        rate = self.settings.label_lr * len(step.ids) / self.settings.label_lr_batch
        self.variables[step.ids] = variables.detach() - rate * gradient
        values = {"loss": loss, "classification": classification, "compatibility": compatibility, "entropy": entropy}
        return values | {"corrected": (variables.argmax(1) != step.labels).double().mean()}

    def _fit_labels(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """The fine-tuning: the label distributions stay, the network learns them."""
        (logits,) = engine.forward((step.images, "classify"))
        return {"loss": divergence(logits, self.variables[step.ids].to(logits.dtype).log_softmax(1))}

    def _measure(self) -> Metrics:
        """How well the label distributions tell which given labels are right. A collective."""
        return label_quality(self.context, self.verdicts().clean_probability, TAU)

    def verdicts(self) -> Verdicts:
        """See Method: the label distributions are the method's own opinion."""
        return soft_verdicts(self.context, self.variables.rows, read=lambda rows: rows.float().softmax(1))


def divergence(logits: Tensor, log_labels: Tensor) -> Tensor:
    """L_c / C: mean over rows and classes of p log(p / y^d), KL(p || y^d) over C."""
    log_p = logits.log_softmax(1)
    return (log_p.exp() * (log_p - log_labels)).mean()
