"""DivideMix (Li, Socher, Hoi; ICLR 2020), in its CIFAR and its real-data form: docs/dividemix.md."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nldist.config.methods import DivideMixMethod
from nldist.data.plan import balanced
from nldist.data.views import View
from nldist.dist.engine import Engine
from nldist.errors import UserError
from nldist.estimate.division import divide
from nldist.losses import negative_entropy
from nldist.methods.divide_pass import DividePass
from nldist.methods.sanm import MaskedPass
from nldist.models import Network
from nldist.passes.base import Metrics, Pass, Split
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase, Verdicts
from nldist.passes.supervised import Step, SupervisedPass
from nldist.passes.sweep import LossSweep

SSL_PASSES = {"mixmatch": DividePass, "sanm": MaskedPass}


class DivideMix(Method):
    """Two networks; each trains on the division into clean and noisy that the other one's losses make."""

    num_networks = 2

    def __init__(self, context: Context) -> None:
        self.ssl = SSL_PASSES[context.config.method.ssl]
        super().__init__(context)
        self.settings = context.config.method.dividemix
        _check_subsets(self.settings, max(context.train.num_classes, 4 * context.world.size))
        self.stale: nn.Module | None = None  # network 0 as it was before this epoch, for peers=parallel
        history = context.config.method.mixture.history
        LossSweep.add_columns(context, "0", "1")
        for number in range(self.num_networks):
            context.table.add(f"clean{number}", torch.float32, fill=1.0)
            if history > 1:
                context.table.add(f"history{number}", torch.float32, (history,), fill=np.nan)

    def build_engines(self) -> list[Engine]:
        """See Method."""
        return [self.context.engine(number, self.shape, partly=self.is_partly) for number in range(self.num_networks)]

    def shape(self, network: Network) -> Network:
        """The network with the heads that its passes need."""
        return self.ssl.shape(network, self.context)

    @property
    def is_partly(self) -> bool:
        """Whether a step may leave a head out."""
        return self.ssl is not DividePass

    def phases(self) -> list[Phase]:
        """See Method."""
        warmup = self.settings.warmup_epochs
        rest = self.context.recipe.epochs - warmup
        return [Phase("warmup", warmup, self._warmup), Phase("divide", rest, self._divide)]

    def _warmup(self, epoch: int) -> list[Pass]:
        return [
            SupervisedPass(
                self.context,
                n,
                engine,
                epoch,
                self._all_loss,
                self.warmup_view,
                self._subset(epoch, n, self.settings.warmup_subset),
            )
            for n, engine in enumerate(self.engines)
        ]

    def _all_loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        (logits,) = engine.forward((step.images, "classify"))
        return {"loss": self.warmup_loss(logits, step.labels)}

    def warmup_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; against confident fits of asymmetric noise plus negative entropy (section 3.1)."""
        loss = F.cross_entropy(logits, labels)
        return loss + negative_entropy(logits) if self.settings.warmup_penalty else loss

    @property
    def warmup_view(self) -> View:
        """The random view of the warm-up."""
        return self.context.train_view

    @property
    def ssl_view(self) -> View:
        """The random view of the semi-supervised training."""
        return self.context.train_view

    def _divide(self, epoch: int) -> list[Pass]:
        logits = {str(n): partial(_logits, engine) for n, engine in enumerate(self.engines)}
        if self.settings.subset is None:
            sweeps = [LossSweep(self.context, logits, self.divide)]
        else:
            sweeps = [
                LossSweep(
                    self.context,
                    {name: logits[name]},
                    self.divide,
                    name=f"sweep{name}",
                    population=self._subset(epoch, int(name), self.settings.subset),
                )
                for name in logits
            ]
        return [*sweeps, self.ssl(self, 0, epoch), self.ssl(self, 1, epoch)]

    def _subset(self, epoch: int, number: int, num_samples: int | None) -> np.ndarray | None:
        """A fresh class-balanced subset for each network and epoch (docs/dividemix.md, "Two forms"); None: all."""
        if num_samples is None:
            return None
        seed = self.context.seed(f"net{number}", "subset")
        num_classes = self.context.train.num_classes
        return balanced(self.context.labels, num_samples, seed=seed, epoch=epoch, num_classes=num_classes)

    def divide(self, sweep: LossSweep) -> Metrics:
        """The mixture over each network's losses (section 3.1) gives every sample its clean probability."""
        metrics: Metrics = {}
        for name, losses in sweep.losses.items():
            metrics |= sweep.divided(name, self._division(name, losses))
        return metrics

    def _division(self, name: str, losses: np.ndarray) -> Split:
        context, table = self.context, self.context.table
        history = table[f"history{name}"].numpy() if context.config.method.mixture.history > 1 else None
        values, mixture = divide(losses, history, context.config.method.mixture, context.world)
        clean_probability = table[f"clean{name}"].numpy()
        if mixture is not None:
            clean_probability[:] = mixture.clean_probability(values)
        # Without a mixture the previous division stays, and samples that it did not see count as clean.
        clean_probability[np.isnan(clean_probability)] = 1
        clean_probability[np.isnan(values)] = np.nan
        return Split(values, clean_probability, mixture, self.settings.tau)

    def verdicts(self) -> Verdicts | None:
        """The mean of both networks' last divisions; with subsets None: they have not seen every sample."""
        if self.settings.subset is not None:
            return None
        table = self.context.table
        clean = np.mean([table[f"clean{n}"].numpy() for n in range(self.num_networks)], axis=0)
        return Verdicts(clean, table["suggested"].numpy())

    def peer(self, number: int) -> nn.Module:
        """The other network, in eval mode."""
        if number == 1 and self.settings.peers == "parallel":
            assert self.stale is not None
            return self.stale.eval()
        peer: nn.Module = self.engines[1 - number].model
        return peer.eval()

    def weights(self) -> list[dict[str, Tensor]]:
        """The networks with their classification heads alone: plain classifiers."""
        return [engine.evaluated.classifier_state() for engine in self.engines]

    @property
    def extra_bytes(self) -> int:
        """The copy of network 0 that network 1 asks where peers=parallel."""
        parallel = self.settings.peers == "parallel"
        return sum(p.nbytes for p in self.engines[0].model.parameters()) if parallel else 0

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        stale = self.stale.state_dict() if self.stale is not None else None
        return super().state_dict() | {"stale": stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        super().load_state_dict(state)
        if state["stale"] is not None:
            self.stale = copy.deepcopy(self.engines[0].model)
            self.stale.load_state_dict(state["stale"])


def _check_subsets(settings: DivideMixMethod, least: int) -> None:
    for name in ("subset", "warmup_subset"):
        if (num_samples := getattr(settings, name)) is not None and num_samples < least:
            raise UserError(f"method.dividemix.{name}={num_samples} is too small: set {least} or more")


def _logits(engine: Engine, images: Tensor) -> Tensor:
    return engine.infer(images, "classify")[0]
