"""M-correction (Arazo, Ortego, Albert, O'Connor, McGuinness; ICML 2019): docs/baselines.md."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.estimate.beta_mixture import BetaMixture, fit_beta
from nldist.losses import one_hot, prior_penalty
from nldist.methods.mixup import mixed_cross_entropy
from nldist.passes.base import Metrics, Pass, Split
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase, Verdicts
from nldist.passes.supervised import Step, SupervisedPass
from nldist.passes.sweep import TAU, LossSweep


class MCorrection(Method):
    """One network under mixup; the likelier its loss says that a label is wrong, the more its own prediction counts.

    Attributes:
        mixture: over the losses at the last epoch's end; None before the first one.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.method.m_correction
        self.mixture: BetaMixture | None = None
        LossSweep.add_columns(context, "0")
        context.table.add("clean0", torch.float32, fill=np.nan)

    def phases(self) -> list[Phase]:
        """Section 4.1: mixup, then mixup with dynamic bootstrapping."""
        warmup = self.settings.warmup_epochs
        return [
            Phase("mixup", warmup, self._warmup),
            Phase("bootstrap", self.context.recipe.epochs - warmup, self._correct),
        ]

    def _warmup(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, self._mixup)]

    def _correct(self, epoch: int) -> list[Pass]:
        train = SupervisedPass(self.context, 0, self.engines[0], epoch, self._bootstrap)
        return [LossSweep(self.context, {"0": self._eval_logits}, self._fit), train]

    def _mixup(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        targets = one_hot(step.labels, self.context.train.num_classes)
        return {"loss": mixed_cross_entropy(engine, step, targets, self.settings.alpha)[0]}

    def _bootstrap(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """Sections 3.2 and 3.3: targets (1 - w) y + w z before mixup, and the penalty R of the mean prediction."""
        (predicted,) = engine.predict((step.images, "classify"))
        noisy = self._noisy_probability(step)
        hard = self.settings.bootstrap == "hard"
        own = one_hot(predicted.argmax(1), predicted.shape[1]) if hard else predicted.softmax(1)
        given = one_hot(step.labels, predicted.shape[1])
        targets = torch.lerp(given.to(own), own, noisy[:, None].to(own))
        corrected, logits = mixed_cross_entropy(engine, step, targets, self.settings.alpha)
        prior = prior_penalty(logits.softmax(1), self.context.world)
        loss = corrected + self.settings.prior_weight * prior
        return {"loss": loss, "corrected": corrected, "prior": prior, "noisy": noisy.double().mean()}

    def _noisy_probability(self, step: Step) -> Tensor:
        """w (b,), from the losses that the network has now for these images; without a mixture every label is clean."""
        if self.mixture is None:
            return torch.zeros(len(step.ids), device=step.images.device)
        logits = self._eval_logits(step.images)
        self.engines[0].model.train()
        return self.mixture.noisy_probability(F.cross_entropy(logits, step.labels, reduction="none"))

    def _eval_logits(self, images: Tensor) -> Tensor:
        engine = self.engines[0]
        return engine.infer(images, "classify")[0]

    def _fit(self, sweep: LossSweep) -> Metrics:
        """The mixture over all losses (section 3.1); where none can be made the one before stays."""
        losses, clean = sweep.losses["0"], self.context.table["clean0"].numpy()
        seen = ~np.isnan(losses)
        self.mixture = fit_beta(losses[seen], self.context.world) or self.mixture
        clean[:] = np.where(seen, 1, np.nan)
        if self.mixture is not None:
            clean[seen] = 1 - self.mixture.noisy_probability(torch.from_numpy(losses[seen])).numpy()
        return sweep.divided("0", Split(losses, clean.copy(), None, TAU))

    def verdicts(self) -> Verdicts:
        """See Method: the mixture of the last epoch."""
        table = self.context.table
        return Verdicts(table["clean0"].numpy(), table["suggested"].numpy())

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        return super().state_dict() | {"mixture": self.mixture and self.mixture.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        super().load_state_dict(state)
        if state["mixture"] is not None:
            self.mixture = BetaMixture.of_state(state["mixture"])
