"""ScanMix (Sachdeva et al., arXiv 2103.11395): DivideMix and clustering by neighbours in one EM loop."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from nldist.data.views import View
from nldist.dist.checkpoint import load_file
from nldist.dist.engine import Engine
from nldist.methods.dividemix import DivideMix
from nldist.models import Network
from nldist.passes.base import Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.supervised import Step, SupervisedPass
from nldist.passes.sweep import LossSweep
from nldist.pretext.mine import MINE
from nldist.pretext.pairs import NeighbourPass
from nldist.pretext.scan import CLUSTER
from nldist.pretext.stage import PRETEXT

log = logging.getLogger(__name__)


class ScanMix(DivideMix):
    """Two networks with two heads, both begun from SCAN's clustering.

    An epoch is DivideMix's (E-step and semi-supervised M-step) and then a clustering pass over all images, with
    neighbours that the other network predicts to be of the anchor's class.
    """

    stages = (PRETEXT, MINE, CLUSTER)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.scan = context.config.method.scanmix
        self.noise_rate: float | None = None  # estimated once, after the warm-up

    is_partly = True

    def shape(self, network: Network) -> Network:
        """See DivideMix."""
        return super().shape(network).add("cluster", nn.Linear(network.num_features, self.context.train.num_classes))

    def start(self) -> None:
        """Begin both networks, and both heads of each, from the best epoch of the clustering (docs/scanmix.md)."""
        state = load_file(self.context.products["cluster"] / "weights" / "best.pt")["networks"][0]
        for engine in self.engines:
            engine.model.load_state_dict(state, strict=False)
            engine.model.heads["cluster"].load_state_dict(engine.model.heads["classify"].state_dict())

    def _warmup(self, epoch: int) -> list[Pass]:
        """Only the classification head learns, so that wrong labels do not spoil the features (docs/scanmix.md)."""
        return [
            SupervisedPass(self.context, number, engine, epoch, self._head_loss, self.warmup_view)
            for number, engine in enumerate(self.engines)
        ]

    def _head_loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """The warm-up's loss; of the backbone only the batch-norm statistics follow."""
        (logits,) = engine.forward((step.images, "classify"), backbone="follows")
        return {"loss": self.warmup_loss(logits, step.labels)}

    @property
    def warmup_view(self) -> View:
        """See DivideMix."""
        return self._view(self.scan.warmup_view)

    @property
    def ssl_view(self) -> View:
        """See DivideMix."""
        return self._view(self.scan.ssl_view)

    @property
    def cluster_view(self) -> View:
        """The random view of the clustering passes."""
        return self._view(self.scan.cluster_view)

    def _view(self, name: str) -> View:
        strong = self.high_noise if name == "by_noise" else name == "strong"
        return self.context.named_view("strong") if strong else self.context.train_view

    @property
    def high_noise(self) -> bool:
        """Whether the estimated noise rate is above the threshold (docs/scanmix.md)."""
        assert self.noise_rate is not None
        return self.noise_rate > self.scan.noise_threshold

    def divide(self, sweep: LossSweep) -> Metrics:
        """The first sweep after the warm-up estimates the noise rate: the share that is not labelled."""
        metrics = super().divide(sweep)
        if self.noise_rate is None:
            self.noise_rate = 1 - (metrics["labelled_share0"] + metrics["labelled_share1"]) / 2
            kind = "high" if self.high_noise else "low"
            log.info("estimated noise rate %.2f: settings for %s noise", self.noise_rate, kind)
        return metrics | {"noise_rate": self.noise_rate}

    def _divide(self, epoch: int) -> list[Pass]:
        passes = super()._divide(epoch)
        every = self.scan.cluster_every
        if every is None or (epoch - self.settings.warmup_epochs) % every:
            return passes
        return [*passes, self._cluster(0, epoch), self._cluster(1, epoch)]

    def _cluster(self, number: int, epoch: int) -> Pass:
        return NeighbourPass(
            self.context,
            number,
            self.engines[number],
            epoch,
            batch_size=self.scan.batch_size,
            lambda_e=self.scan.lambda_e,
            rate=lambda _: self.scan.lr_high if self.high_noise else self.scan.lr_low,
            view=lambda: self.cluster_view,
            predicted=lambda: self.context.table[f"predicted{1 - number}"].gather(),
            include_self=self.scan.include_self,
            population=self._anchors(number, epoch),
        )

    def _anchors(self, number: int, epoch: int) -> np.ndarray | None:
        """The images that a clustering pass begins from, None for all."""
        num_samples = len(self.context.train)
        if self.scan.anchors is None or self.scan.anchors >= num_samples:
            return None
        generator = self.context.generator(f"net{number}", "anchors", epoch)
        return np.sort(generator.permutation(num_samples)[: self.scan.anchors])

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        return super().state_dict() | {"noise_rate": self.noise_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        super().load_state_dict(state)
        self.noise_rate = state["noise_rate"]
