"""The pass over pairs of neighbours: SCAN's (Van Gansbeke et al., ECCV 2020) and ScanMix's (docs/scanmix.md)."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nldist.data.neighbour_plan import neighbours
from nldist.data.plan import Plan
from nldist.data.stream import Batch
from nldist.data.views import View
from nldist.dist.engine import Backbone, Engine
from nldist.dist.rows import global_mean, row_counts
from nldist.losses import agreement, mean_negative_entropy
from nldist.passes.base import Batches, EnginePass
from nldist.passes.context import Context
from nldist.pretext.mine import GRAPH_FILE


class NeighbourPass(EnginePass):
    """One epoch over anchors, one neighbour of each: agreement of the pair, entropy of the global batch.

    Args:
        context: of the run.
        number: the network's.
        engine: the network's.
        epoch: in the whole run.
        batch_size: anchors per step and rank.
        lambda_e: weight of the entropy term.
        rate: learning rate at a fractional epoch.
        num_heads: clusterings that the network's outputs are, one after the other; the loss is their mean.
        view: random view of anchors and neighbours; None = views.train.
        predicted: gives the predicted class (N,) of every id when the pass begins; None = every neighbour is valid.
        include_self: count an image among its own neighbours.
        population: sorted ids of the anchors; None = all.
        backbone: what becomes of it.
    """

    def __init__(
        self,
        context: Context,
        number: int,
        engine: Engine,
        epoch: int,
        *,
        batch_size: int,
        lambda_e: float,
        rate: Callable[[float], float],
        num_heads: int = 1,
        view: Callable[[], View] | None = None,
        predicted: Callable[[], np.ndarray] | None = None,
        include_self: bool = True,
        population: np.ndarray | None = None,
        backbone: Backbone = "learns",
    ) -> None:
        super().__init__(context, number, engine, epoch)
        self.name = f"cluster{number}"
        self.batch = {"anchors": batch_size, "neighbours": batch_size}
        self.num_samples = len(context.train) if population is None else len(population)
        self.num_rows = 2 * batch_size
        self._num_heads, self._lambda_e, self._rate = num_heads, lambda_e, rate
        self._view, self._predicted, self._include_self = view, predicted, include_self
        self._population, self._backbone = population, backbone

    def plan(self) -> Plan:
        """See Pass."""
        context, world = self.context, self.context.world
        return neighbours(
            len(context.train),
            graph_path(context),
            rank=world.rank,
            size=world.size,
            batch_size=self.batch["anchors"],
            seed=context.seed(self.name, "plan"),
            epoch=self.epoch,
            window=context.config.data.window,
            predicted=self._predicted() if self._predicted else None,
            include_self=self._include_self,
            population=self._population,
        )

    def usable(self, batches: Batches) -> bool:
        """See Pass."""
        return len(whole_pairs(batches["anchors"], batches["neighbours"])[0]) > 0

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        world = self.context.world
        anchors, partners = whole_pairs(batches["anchors"], batches["neighbours"])
        view = self._view() if self._view else None
        images = [
            self.context.view(batches[role], self.epoch, f"{self.name}/{role}", view)[rows]
            for role, rows in (("anchors", anchors), ("neighbours", partners))
        ]
        calls = [(image, "cluster") for image in images]
        log_p, log_n = (
            logits.view(len(logits), self._num_heads, -1).log_softmax(2)
            for logits in self.engine.forward(*calls, backbone=self._backbone)
        )
        disagreement = -global_mean(agreement(log_p, log_n).mean(1), row_counts(len(log_p), world), world)
        # The sum of all heads' terms, in one collective.
        entropy = mean_negative_entropy(log_p.exp().flatten(1), world) / self._num_heads
        loss = disagreement + self._lambda_e * entropy
        self.engine.step(loss, self._rate(self.progress(step)))
        return {"loss": loss.detach(), "loss_agree": disagreement.detach(), "loss_entropy": entropy.detach()}


def graph_path(context: Context) -> Path:
    """The neighbour graph that stage mine has left."""
    return context.products["mine"] / "tables" / GRAPH_FILE


def whole_pairs(anchors: Batch, partners: Batch) -> tuple[Tensor, Tensor]:
    """Rows of both batches that make whole pairs: where one image could not be read, its partner is left out."""
    place, found = find(anchors.draws, partners.draws)
    return found, place[found]


def find(wanted: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `wanted` its place in `draws` (distinct), and which of them are there at all."""
    if not len(draws):
        return torch.zeros_like(wanted), wanted.new_empty(0)
    ordered, order = draws.sort()
    place = torch.searchsorted(ordered, wanted).clamp_max(len(draws) - 1)
    return order[place], torch.nonzero(ordered[place] == wanted)[:, 0]
