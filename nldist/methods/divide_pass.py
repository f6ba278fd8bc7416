"""DivideMix's semi-supervised epoch: MixMatch with co-refinement and co-guessing (docs/dividemix.md)."""

import copy
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nldist.data.plan import Plan, divided
from nldist.data.stream import Batch
from nldist.data.views import View
from nldist.losses import class_mean_squared_error, mix, one_hot, prior_penalty, sharpen, soft_cross_entropy
from nldist.models import Network
from nldist.passes.base import Batches, EnginePass
from nldist.passes.context import Context

if TYPE_CHECKING:
    from nldist.methods.dividemix import DivideMix

log = logging.getLogger(__name__)


class DividePass(EnginePass):
    """One epoch of semi-supervised training of one network on its peer's division (DivideMix, Algorithm 1)."""

    def __init__(self, method: "DivideMix", number: int, epoch: int) -> None:
        super().__init__(method.context, number, method.engines[number], epoch)
        self._method, self._settings = method, method.settings
        half = method.context.recipe.batch_size // 2
        self.batch = {"labelled": half, "unlabelled": half}
        self.num_samples = self._settings.subset or len(self.context.train)
        self.num_rows = half * (4 if self._settings.form == "cifar" else 2)

    def plan(self) -> Plan:
        """Co-divide: labelled where the peer's clean probability exceeds tau, of the samples that it saw."""
        context, world = self.context, self.context.world
        self._clean = context.table[f"clean{1 - self.number}"].gather()
        labelled = np.flatnonzero(self._clean > self._settings.tau)
        unlabelled = np.flatnonzero(self._clean <= self._settings.tau)
        if len(labelled) < 2 * world.size:
            # The reference divides by zero here.
            log.warning("net%d: %d samples are too few to train on; all count as clean", self.number, len(labelled))
            labelled, unlabelled = np.flatnonzero(~np.isnan(self._clean)), unlabelled[:0]
            self._clean = np.ones_like(self._clean)
        return divided(
            len(context.train),
            labelled,
            unlabelled,
            rank=world.rank,
            size=world.size,
            batch_size=self.batch["labelled"],
            seed=context.seed(self.name, "plan"),
            epoch=self.epoch,
            window=context.config.data.window,
        )

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        super().start(num_steps, start_step)
        if self.number == 0 and start_step == 0 and self._settings.peers == "parallel":
            self._method.stale = copy.deepcopy(self.engine.model)
        self._peer = self._method.peer(self.number)
        self._clean_on_device = torch.from_numpy(self._clean).to(self.context.world.device)

    @classmethod
    def shape(cls, network: Network, context: Context) -> Network:
        """The network with the heads that this pass needs beside its classifier: none."""
        return network

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """One step: guess targets, mix, descend (Algorithm 1, lines 11 to 27)."""
        labelled, unlabelled = batches["labelled"], batches["unlabelled"]
        x, u = self._views(labelled), self._views(unlabelled)
        # In this order: batch norm's running averages weigh the later forward more.
        own = self._own([*u, *x])
        guessed = [self._guess(own[:2], u)] * 2 if u else []
        targets = [self._refine(labelled, own[-2:])] * 2 + guessed
        num_rows = 2 * len(labelled.ids)
        mixed, mixed_targets = self._mix(torch.cat([*x, *u]), torch.cat(targets), num_rows, step)
        (logits,) = self.engine.forward((mixed, "classify"))
        return self._descend(self._losses(logits, mixed_targets, num_rows), step)

    def _descend(self, losses: dict[str, Tensor], step: int, more: float | Tensor = 0.0) -> Mapping[str, Tensor]:
        """Line 27: the weighted sum of the terms (and `more`); returns the terms."""
        loss = losses["loss_x"] + losses["prior"] + more
        if "loss_u" in losses:
            loss = loss + self._lambda_u(step) * losses["loss_u"]
        self.descend(loss, step)
        return {name: value.detach() for name, value in losses.items()}

    def _views(self, batch: Batch) -> list[Tensor]:
        """Two independent augmentations, none for an empty batch."""
        return self._several(batch, "", self._method.ssl_view)

    def _several(self, batch: Batch, name: str, view: View) -> list[Tensor]:
        names = [f"{self.name}/{name}{n}" for n in (0, 1)] if len(batch.ids) else []
        return [self.context.view(batch, self.epoch, name, view) for name in names]

    def _own(self, views: list[Tensor]) -> list[Tensor]:
        """This network's probabilities of each view; batch norm sees one view after the other."""
        outputs = self.engine.predict(*((view, "classify") for view in views))
        return [logits.softmax(1) for logits in outputs]

    def _refine(self, batch: Batch, own: list[Tensor]) -> Tensor:
        """Co-refinement of the labelled (equations 3 and 4): this network only, by the peer's clean probability."""
        clean = self._clean_on_device[batch.ids][:, None]
        mean = torch.stack(own).mean(0)
        labels = one_hot(batch.labels, mean.shape[1])
        return sharpen(clean * labels + (1 - clean) * mean, self._settings.temperature)

    def _guess(self, own: list[Tensor], views: list[Tensor]) -> Tensor:
        """Co-guessing of the unlabelled (Algorithm 1, lines 20 and 21): the mean over both networks and views.

        The peer is in eval mode: it sees both views at once.
        """
        (logits,) = self.engine.predict((torch.cat(views), "classify"), by=self._peer)
        peer = logits.softmax(1).chunk(len(views))
        return sharpen(torch.stack([*own, *peer]).mean(0), self._settings.temperature)

    def _mix(self, images: Tensor, targets: Tensor, num_labelled: int, step: int) -> tuple[Tensor, Tensor]:
        """MixMatch over labelled and unlabelled rows; form=real keeps the labelled rows only."""
        generator = self.context.generator(self.name, "mix", self.epoch, step, self.context.world.rank)
        weight = float(generator.beta(self._settings.alpha, self._settings.alpha))
        weight = max(weight, 1 - weight)
        permutation = torch.from_numpy(generator.permutation(len(images))).to(images.device)
        num_rows = len(images) if self._settings.form == "cifar" else num_labelled
        return mix(images, permutation, weight, num_rows), mix(targets, permutation, weight, num_rows)

    def _losses(self, logits: Tensor, targets: Tensor, num_labelled: int) -> dict[str, Tensor]:
        """The labelled, the unlabelled and the prior term (equations 9, 10 and 11)."""
        probabilities = logits.softmax(1)
        losses = {
            "loss_x": soft_cross_entropy(logits[:num_labelled], targets[:num_labelled]),
            "prior": prior_penalty(probabilities, self.context.world),
        }
        if self._settings.form == "cifar":
            p, t = probabilities[num_labelled:], targets[num_labelled:]
            losses["loss_u"] = class_mean_squared_error(p, t) if len(p) else p.sum()
        return losses

    def _lambda_u(self, step: int) -> float:
        """The weight of the unlabelled loss, grown linearly after the warm-up."""
        progress = (self.progress(step) - self._settings.warmup_epochs) / self._settings.rampup_epochs
        return self._settings.lambda_u * min(1.0, progress)
