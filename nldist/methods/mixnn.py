"""MixNN: "Mitigating Noisy Supervision Using Synthetic Samples with Soft Labels" (Lu and He, arXiv 2406.16966).

docs/mixnn.md has the equations.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from nldist.data.neighbour_plan import neighbourhoods
from nldist.data.plan import Plan
from nldist.data.stream import Batch
from nldist.dist.engine import Engine
from nldist.estimate.division import divide
from nldist.losses import mix, one_hot, soft_cross_entropy
from nldist.methods.cross_entropy import cross_entropy
from nldist.passes.base import Batches, EnginePass, Metrics, Pass, Split
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase, Verdicts
from nldist.passes.search import SearchSweep
from nldist.passes.soft import accuracy, corrected, given_share, soft_labels, update
from nldist.passes.supervised import Loss, Step, SupervisedPass
from nldist.passes.sweep import TAU, LossSweep
from nldist.pretext.pairs import find

_GUARD = 1e-10  # authors' code


class MixNN(Method):
    """One network; after es it learns mixtures of each sample with its nearest neighbours, and soft labels."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.method.mixnn
        self.population = context.subset(self.settings.subset)
        self.soft = soft_labels(context, "soft")
        self.clean = context.table.add("clean", torch.float32, fill=1.0, on="device")
        LossSweep.add_columns(context, "")
        history = context.config.method.mixture.history
        self.history = context.table.add("history", torch.float32, (history,), fill=np.nan) if history > 1 else None
        self.searches = self.settings.neighbours == "data_set" and self.settings.k > 1
        if self.searches:
            self.neighbours = context.table.add("neighbours", torch.int32, (self.settings.k - 1,), fill=-1)

    def phases(self) -> list[Phase]:
        """See Method."""
        warmup, turning = self.settings.warmup_epochs, self.settings.turning_epoch
        rest = self.context.recipe.epochs - turning
        return [
            Phase("warmup", warmup, lambda epoch: [self._supervised(epoch, cross_entropy)]),
            Phase("mixup", turning - warmup, self._mixup),
            Phase("synthetic", rest, self._synthetic),
        ]

    def _supervised(self, epoch: int, loss: Loss, after: Callable[[], Metrics] = dict) -> Pass:
        return SupervisedPass(self.context, 0, self.engines[0], epoch, loss, population=self.population, after=after)

    def measure(self) -> Metrics:
        """How good the soft labels are. A collective."""
        return accuracy(self.context, self.soft, self.population)

    def _mixup(self, epoch: int) -> list[Pass]:
        """Losses of these epochs count where the mixture averages over several: then sweeps come before es."""
        to_come = self.settings.turning_epoch - epoch  # epochs until the mixture is first used
        sweeps = [self._sweep()] if to_come < self.context.config.method.mixture.history else []
        if to_come > 1:
            return [*sweeps, self._supervised(epoch, self.mixup_loss)]
        return [*sweeps, self._supervised(epoch, self.turning_loss, self.measure)]

    def _synthetic(self, epoch: int) -> list[Pass]:
        if not self.searches:
            return [self._sweep(), self._supervised(epoch, self.synthetic_loss, self.measure)]
        due = (epoch - self.settings.turning_epoch) % self.settings.refresh_epochs == 0
        search = [SearchSweep(self.context, self._features, self.neighbours, self.population)] if due else []
        return [self._sweep(), *search, NeighbourhoodPass(self, epoch)]

    def _features(self, images: Tensor) -> Tensor:
        return self.engines[0].infer(images, "features")[0]

    # The mixture

    def _sweep(self) -> Pass:
        return LossSweep(
            self.context,
            {"": self._logits},
            self.divide,
            population=self.population,
            labels=lambda ids: self.soft[ids].argmax(1),
        )

    def _logits(self, images: Tensor) -> Tensor:
        return self.engines[0].infer(images, "classify")[0]

    def divide(self, sweep: LossSweep) -> Metrics:
        """The mixture over the losses of the corrected labels argmax s_i gives every sample its weight w_i."""
        context = self.context
        history = None if self.history is None else self.history.numpy()
        values, mixture = divide(sweep.losses[""], history, context.config.method.mixture, context.world)
        seen, clean = ~np.isnan(values), self.clean.rows.cpu().numpy()
        if mixture is not None:  # else the weights before stay
            clean[seen] = mixture.clean_probability(values[seen])
            self.clean.rows.copy_(torch.from_numpy(clean))
        found = self._judge()
        return sweep.divided("", Split(values, found.clean_probability, mixture, TAU, corrected(self.soft)))

    def _judge(self) -> Verdicts:
        """The given labels by the weights and the soft labels.

        Where the corrected label is the given one, w_i is its probability. Else the given one can only be right where
        the corrected one is wrong, and has its share of the soft label then.
        """
        context, suggested = self.context, corrected(self.soft)
        given = context.labels[self.soft.owned.start : self.soft.owned.stop]
        weight = self.clean.rows.cpu().numpy()
        clean = np.where(suggested == given, weight, (1 - weight) * given_share(context, self.soft))
        seen = ~np.isnan(context.table["loss"].numpy())
        return Verdicts(np.where(seen, clean, np.float32(np.nan)), np.where(seen, suggested, -1))

    def verdicts(self) -> Verdicts | None:
        """By the last mixture and the soft labels; with a subset None: they are not those of every sample."""
        return self._judge() if self.population is None else None

    # The losses

    def is_due(self, epoch: int) -> bool:
        """Whether the soft labels move in an epoch (counted from 0)."""
        return (epoch + 1) % self.settings.update_every == 0

    def mixup_loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """Ordinary mixup with the given labels, before es."""
        logits, targets = self._mixed(engine, step, one_hot(step.labels, self.context.train.num_classes))
        if self.settings.mixup_loss == "linear":
            return {"loss": -(targets * logits.softmax(1)).sum(1).mean()}
        return {"loss": soft_cross_entropy(logits, targets)}

    def turning_loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """Ordinary mixup with the soft labels, in epoch es."""
        if self.is_due(int(step.epoch)):
            update(self.soft, step.ids, engine.predict((step.images, "classify"))[0], self.settings.momentum)
        logits, targets = self._mixed(engine, step, self.soft[step.ids].to(step.images))
        return {"loss": soft_cross_entropy(logits, targets)}

    def _mixed(self, engine: Engine, step: Step, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets of mixtures with random partners; one weight per step, uniform: Beta(1, 1)."""
        num_rows, weight = len(step.images), float(step.random.uniform())
        permutation = torch.from_numpy(step.random.permutation(num_rows)).to(step.images.device)
        (logits,) = engine.forward((mix(step.images, permutation, weight, num_rows), "classify"))
        return logits, mix(targets, permutation, weight, num_rows)

    def synthetic_loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """Synthetic samples of each sample and its nearest ones in the batch, after es."""
        features, logits = engine.predict((step.images, "features", "classify"))
        if self.is_due(int(step.epoch)):
            update(self.soft, step.ids, logits, self.settings.momentum)
        members = nearest_in_batch(features, self.settings.k)
        return synthetic(engine, step.images, self.soft[step.ids], members, self.clean[step.ids][members])


def nearest_in_batch(features: Tensor, k: int) -> Tensor:
    """Each row's number and those of the k - 1 nearest other rows (as many as there are), by Euclidean distance.

    Args:
        features: (b, d).
        k: 1 or more.

    Returns:
        int64 (b, min(k, b)), nearest first; of equally near ones the earlier.
    """
    num_others = min(k, len(features)) - 1
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    others = distances.fill_diagonal_(torch.inf).sort(dim=1, stable=True).indices[:, :num_others]
    rows = torch.arange(len(features), device=features.device)[:, None]
    return torch.cat([rows, others], dim=1)


def mixing_weights(clean: Tensor) -> Tensor:
    """a_k = w_k / sum w of a sample (in column 0) and its neighbours; with all w zero it stays itself.

    Args:
        clean: (b, K) clean probabilities w.

    Returns:
        (b, K), rows of sum 1.
    """
    own = torch.zeros_like(clean)
    own[:, 0] = _GUARD
    return (clean + own) / (clean.sum(1, keepdim=True) + _GUARD)


def synthetic(engine: Engine, images: Tensor, soft: Tensor, members: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """The loss of synthetic samples x~ = sum a_k x_k: sum a_k CE(p(x~), s_k), which is CE(p(x~), sum a_k s_k).

    Args:
        engine: the network's.
        images: (m, 3, h, w) of which they are made.
        soft: (m, C) their soft labels.
        members: int64 (b, K), the images that make each synthetic one, the one that it stands for first.
        clean: (b, K) their clean probabilities.
    """
    weights = mixing_weights(clean)
    mixing = weights.new_zeros(len(members), len(images)).scatter_add_(1, members, weights).to(images)
    mixed = (mixing @ images.flatten(1)).view(-1, *images.shape[1:])
    (logits,) = engine.forward((mixed, "classify"))
    return {"loss": soft_cross_entropy(logits, mixing @ soft.to(mixing)), "own_weight": weights[:, 0].mean()}


class NeighbourhoodPass(EnginePass):
    """One epoch of synthetic samples with neighbours from anywhere in the data set: `neighbours=data_set`."""

    def __init__(self, method: MixNN, epoch: int) -> None:
        super().__init__(method.context, 0, method.engines[0], epoch)
        self._method, self._num_others = method, method.settings.k - 1
        size, population = method.context.recipe.batch_size, method.population
        self.batch = {"anchors": size, "neighbours": size * self._num_others}
        self.num_samples = len(method.context.train) if population is None else len(population)
        self.num_rows = size

    def plan(self) -> Plan:
        """See Pass."""
        context, column = self.context, self._method.neighbours
        anchors = context.shuffled(self.epoch, self.name, self.batch["anchors"], self._method.population)
        return neighbourhoods(len(context.train), anchors, column.numpy(), column.owned.start)

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        super().start(num_steps, start_step)
        self._clean = torch.from_numpy(self._method.clean.gather()).to(self.context.world.device)

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """One step: move the soft labels where due, mix, descend."""
        anchors, others = batches["anchors"], batches["neighbours"]
        method, own = self._method, self._view(anchors, "anchors")
        if method.is_due(self.epoch):
            update(method.soft, anchors.ids, self.engine.predict((own, "classify"))[0], method.settings.momentum)
        soft = torch.cat([method.soft[anchors.ids], method.soft.fetch(others.ids)])
        images = torch.cat([own, self._view(others, "neighbours")]) if len(others) else own
        members, present = self._members(anchors, others)
        clean = self._clean[torch.cat([anchors.ids, others.ids])][members] * present
        values = synthetic(self.engine, images, soft, members, clean)
        self.descend(values["loss"], step)
        return {name: value.detach() for name, value in values.items()}

    def _view(self, batch: Batch, role: str) -> Tensor:
        return self.context.view(batch, self.epoch, f"{self.name}/{role}")

    def _members(self, anchors: Batch, others: Batch) -> tuple[Tensor, Tensor]:
        """Rows of anchors and neighbours, one behind the other, that belong to each anchor; and which could be read.

        Returns:
            int64 (b, K), the anchor first (and in place of a neighbour that is missing), and float32 (b, K) of 0 and 1.
        """
        rows = torch.arange(len(anchors), device=anchors.ids.device)
        slots = len(self.context.train) * torch.arange(self._num_others, device=rows.device)
        place, found = find((anchors.draws[:, None] + slots).flatten(), others.draws)
        members, present = rows.repeat_interleave(self._num_others), torch.zeros(len(place), device=rows.device)
        members[found], present[found] = len(anchors) + place[found], 1.0
        members, present = members.view(-1, self._num_others), present.view(-1, self._num_others)
        return torch.cat([rows[:, None], members], 1), torch.cat([torch.ones_like(present[:, :1]), present], 1)

    def finish(self) -> Metrics:
        """See Pass."""
        return super().finish() | self._method.measure()
