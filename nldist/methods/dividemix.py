"""DivideMix (Li, Socher, Hoi; ICLR 2020), in its CIFAR and its real-data form: docs/dividemix.md."""

import copy
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nldist.data.plan import Plan, balanced, divided
from nldist.data.stream import Batch
from nldist.data.views import View
from nldist.dist.engine import Engine
from nldist.errors import UserError
from nldist.estimate.division import divide
from nldist.losses import (
    class_mean_squared_error,
    mix,
    negative_entropy,
    one_hot,
    prior_penalty,
    sharpen,
    soft_cross_entropy,
)
from nldist.passes.base import Batches, EnginePass, Metrics, Pass, Split
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase, Verdicts
from nldist.passes.supervised import Step, SupervisedPass
from nldist.passes.sweep import LossSweep

log = logging.getLogger(__name__)


class DivideMix(Method):
    """Two networks; each trains on the division into clean and noisy that the other one's losses make."""

    num_networks = 2

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.method.dividemix
        least = max(context.train.num_classes, 4 * context.world.size)
        if self.settings.subset is not None and self.settings.subset < least:
            raise UserError(f"method.dividemix.subset={self.settings.subset} is too small: set {least} or more")
        self.stale: nn.Module | None = None  # network 0 as it was before this epoch, for peers=parallel
        history = context.config.method.mixture.history
        LossSweep.add_columns(context, "0", "1")
        for number in range(self.num_networks):
            context.table.add(f"clean{number}", torch.float32, fill=1.0)
            if history > 1:
                context.table.add(f"history{number}", torch.float32, (history,), fill=np.nan)

    def phases(self) -> list[Phase]:
        """See Method."""
        warmup = self.settings.warmup_epochs
        rest = self.context.recipe.epochs - warmup
        return [Phase("warmup", warmup, self._warmup), Phase("divide", rest, self._divide)]

    def _warmup(self, epoch: int) -> list[Pass]:
        return [
            SupervisedPass(self.context, n, engine, epoch, self._all_loss, self.warmup_view)
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
        logits = {str(n): partial(self._logits, engine) for n, engine in enumerate(self.engines)}
        if self.settings.subset is None:
            sweeps = [LossSweep(self.context, logits, self.divide)]
        else:
            sweeps = [
                LossSweep(
                    self.context,
                    {name: logits[name]},
                    self.divide,
                    name=f"sweep{name}",
                    population=self._subset(epoch, int(name)),
                )
                for name in logits
            ]
        return [*sweeps, DividePass(self, 0, epoch), DividePass(self, 1, epoch)]

    def _logits(self, engine: Engine, images: Tensor) -> Tensor:
        return engine.predict(images, "classify", by=engine.model.eval())[0]

    def _subset(self, epoch: int, number: int) -> np.ndarray:
        """A fresh class-balanced subset for each network and epoch (docs/dividemix.md, "Two forms")."""
        assert self.settings.subset is not None
        seed = self.context.seed(f"net{number}", "subset")
        num_classes = self.context.train.num_classes
        return balanced(self.context.labels, self.settings.subset, seed=seed, epoch=epoch, num_classes=num_classes)

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


class DividePass(EnginePass):
    """One epoch of semi-supervised training of one network on its peer's division (DivideMix, Algorithm 1)."""

    def __init__(self, method: DivideMix, number: int, epoch: int) -> None:
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

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """One step: guess targets, mix, descend (Algorithm 1, lines 11 to 27)."""
        labelled, unlabelled = batches["labelled"], batches["unlabelled"]
        x, u = self._views(labelled), self._views(unlabelled)
        # In this order: batch norm's running averages weigh the later forward more.
        guessed = [self._guess(u)] * 2 if u else []
        targets = [self._refine(labelled, x)] * 2 + guessed
        num_rows = 2 * len(labelled.ids)
        mixed, mixed_targets = self._mix(torch.cat([*x, *u]), torch.cat(targets), num_rows, step)
        (logits,) = self.engine.forward((mixed, "classify"))
        losses = self._losses(logits, mixed_targets, num_rows)
        loss = losses["loss_x"] + losses["prior"]
        if "loss_u" in losses:
            loss = loss + self._lambda_u(step) * losses["loss_u"]
        self.descend(loss, step)
        return {name: value.detach() for name, value in losses.items()}

    def _views(self, batch: Batch) -> list[Tensor]:
        """Two independent augmentations, none for an empty batch."""
        view = self._method.ssl_view
        return (
            [self.context.view(batch, self.epoch, f"{self.name}/{n}", view) for n in (0, 1)] if len(batch.ids) else []
        )

    def _refine(self, batch: Batch, views: list[Tensor]) -> Tensor:
        """Co-refinement of the labelled (equations 3 and 4): this network only, by the peer's clean probability."""
        clean = self._clean_on_device[batch.ids][:, None]
        own = torch.stack([self._probabilities(view) for view in views]).mean(0)
        labels = one_hot(batch.labels, own.shape[1])
        return sharpen(clean * labels + (1 - clean) * own, self._settings.temperature)

    def _guess(self, views: list[Tensor]) -> Tensor:
        """Co-guessing of the unlabelled (Algorithm 1, lines 20 and 21): the mean over both networks and views."""
        own = [self._probabilities(view) for view in views]
        peer = [self._probabilities(view, self._peer) for view in views]
        return sharpen(torch.stack(own + peer).mean(0), self._settings.temperature)

    def _probabilities(self, images: Tensor, by: nn.Module | None = None) -> Tensor:
        return self.engine.predict(images, "classify", by=by)[0].softmax(1)

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
