"""LEND, label noise dilution (Zhang et al., Machine Learning 111, 2022; arXiv 2206.13025): docs/lend.md."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.config import LendMethod
from nldist.dist.engine import Engine
from nldist.dist.rows import first_row, gather_rows, row_counts
from nldist.losses import one_hot
from nldist.passes.base import Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase, Verdicts
from nldist.passes.soft import soft_labels, soft_verdicts
from nldist.passes.supervised import Step, SupervisedPass
from nldist.passes.sweep import TAU, label_quality


class Lend(Method):
    """One network; labels spread over a graph of each batch's features say how far each given label is trusted."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.method.lend
        self.diluted = soft_labels(context, "diluted")
        self.seen = context.table.add("seen", torch.bool, on="device")

    def phases(self) -> list[Phase]:
        """See Method."""
        return [Phase("train", self.context.recipe.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        return [LendPass(self, epoch)]

    def loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """The loss of the given labels, each as far as its diluted label agrees with it (equations 6 and 7)."""
        logits, features = engine.forward((step.images, "classify", "features"))
        diluted, isolated = self._dilute(features.detach(), step)
        if self.settings.profile == "code":
            weight = diluted.gather(1, step.labels[:, None])[:, 0]
        else:
            weight = (diluted.argmax(1) == step.labels).to(logits.dtype)
        losses = weight * F.cross_entropy(logits, step.labels, reduction="none")
        return {"loss": losses.mean(), "weight": weight.mean(), "isolated": isolated.to(logits.dtype).mean()}

    def _dilute(self, features: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The batch's diluted labels (b, C), kept for the next epoch (equation 5); and which rows are isolated (b,)."""
        settings, before = self.settings, self.diluted[step.ids].to(features)
        labels = one_hot(step.labels, self.context.train.num_classes).to(features)
        if settings.profile == "code" and step.epoch >= settings.history_from:
            labels = settings.beta * labels + (1 - settings.beta) * before
        diluted, isolated = self.spread(features, labels)
        if settings.profile == "paper":
            diluted = (1 - settings.beta) * diluted + settings.beta * before
        self.diluted[step.ids] = diluted
        self.seen[step.ids] = torch.ones_like(isolated)
        return diluted, isolated

    def spread(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (b, C) diluted over the graph of the features (b, F), and which rows are isolated (b,).

        With graph=all_ranks every rank builds the graph of all ranks' rows and takes its own of what comes out: a
        collective.
        """
        if self.settings.graph == "rank":
            return spread(features, labels, self.settings)
        world = self.context.world
        counts = row_counts(len(features), world)
        all_features, all_labels = gather_rows(features, world, counts), gather_rows(labels, world, counts)
        diluted, isolated = spread(all_features, all_labels, self.settings)
        own = slice(first_row(counts, world), first_row(counts, world) + len(features))
        return diluted[own], isolated[own]

    def verdicts(self) -> Verdicts:
        """The diluted labels: what of each is its given label's, and the class that has the most."""
        return soft_verdicts(self.context, self.diluted.rows, self.seen.rows)

    def quality(self) -> Metrics:
        """How well the diluted labels tell right from wrong; where that is known, how many are right. A collective."""
        context, verdicts = self.context, self.verdicts()
        found = label_quality(context, verdicts.clean_probability, TAU)
        suggested = context.world.all_gather(verdicts.suggested)
        if context.clean is None or not context.world.is_main:  # it reports
            return found
        right = (suggested == context.clean)[suggested >= 0].mean()
        return found | {"diluted_accuracy": 100 * float(right)}


class LendPass(SupervisedPass):
    """One epoch over all samples."""

    def __init__(self, method: Lend, epoch: int) -> None:
        super().__init__(method.context, 0, method.engines[0], epoch, method.loss)
        self._method = method

    def finish(self) -> Metrics:
        """See Pass."""
        return super().finish() | self._method.quality()


def spread(features: Tensor, labels: Tensor, settings: LendMethod) -> tuple[Tensor, Tensor]:
    """Labels (b, C) diluted over the graph of the features (b, F), and which rows are isolated (b,).

    An isolated row keeps its label.
    """
    edges = affinity(features, settings.k - (settings.profile == "code"), settings.gamma)
    graph, isolated = normalised(edges @ edges.T if settings.profile == "code" else edges.T @ edges)
    diluted = dilute(graph, labels, settings)
    return torch.where(isolated[:, None], labels, diluted), isolated


def affinity(features: Tensor, num_neighbours: int, gamma: float) -> Tensor:
    """A (b, b): max(v_i . v_j, 0)^gamma where j is among the nearest others of i, else 0 (equation 1).

    Divided by the largest value, which cancels in the normalised graph: a power of large features would overflow.
    """
    products = features @ features.T
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products).fill_diagonal_(torch.inf)
    nearest = distances.topk(min(num_neighbours, len(features) - 1), largest=False).indices
    near = torch.zeros_like(products).scatter_(1, nearest, 1.0)
    edges = near * products.clamp_min(0)
    return (edges / edges.amax().clamp_min(torch.finfo(edges.dtype).tiny)) ** gamma


def normalised(weights: Tensor) -> tuple[Tensor, Tensor]:
    """W = D^-1/2 W' D^-1/2 (b, b), D the sums of the rows of W' (equation 2); and which rows are isolated (b,).

    Those have no weight, in W' or, but for subnormal numbers, in float32; they are zero in W.
    """
    degrees = weights.sum(1)
    isolated = degrees < torch.finfo(weights.dtype).tiny
    scale = degrees.rsqrt().masked_fill(isolated, 0)
    return scale[:, None] * weights * scale, isolated


def dilute(graph: Tensor, labels: Tensor, settings: LendMethod) -> Tensor:
    """Class probabilities (b, C): labels (b, C), diluted by their neighbours' over the graph W (b, b) (equation 3)."""
    alpha, diluted = settings.alpha, labels
    form = settings.dilution or ("closed" if settings.profile == "code" else "lazy")
    if form == "closed":
        system = -alpha * graph
        system.diagonal().add_(1)  # positive definite: W' is a Gram matrix, and W's eigenvalues are at most 1
        factor, _ = torch.linalg.cholesky_ex(system)  # does not wait for the device
        return torch.cholesky_solve(labels, factor).softmax(1)
    for _ in range(settings.steps):
        diluted = alpha * graph @ diluted + (1 - alpha) * (labels if form == "zhou" else diluted)
    return F.normalize(diluted, p=1, dim=1)
