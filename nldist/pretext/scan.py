"""SCAN (Van Gansbeke et al., ECCV 2020): clustering by neighbours, ScanMix's second stage (docs/scanmix.md)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nldist.config import ClusterSection, Config, Recipe
from nldist.data.neighbour_plan import nearest
from nldist.data.plan import Plan
from nldist.dist.checkpoint import load_file
from nldist.dist.engine import Engine
from nldist.errors import UserError
from nldist.losses import agreement
from nldist.models import Network
from nldist.models.network import Predictor
from nldist.passes.base import Batches, Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.evaluate import EvaluationPass
from nldist.passes.method import Method, Phase, Stage
from nldist.pretext.pairs import NeighbourPass, find, graph_path

_NUM_SCORED = 6  # pairs of an image that count in the score of an epoch, with itself first: the authors' number


class Scan(Method):
    """The pre-trained backbone with heads whose outputs become clusters; no label is used.

    Of several heads the one that does best on the images kept apart is the result (sub-heads as in IIC, Ji et al. 2019:
    a clustering easily merges two classes and divides a third).
    """

    score = "validation_score"
    uses_labels = False

    def __init__(self, context: Context) -> None:
        assert context.config.cluster is not None
        self.settings = context.config.cluster
        self.best_head = 0
        super().__init__(context)
        num_samples = len(context.train)
        order = context.generator("holdout").permutation(num_samples)
        num_kept = _num_kept(self.settings, num_samples)
        self.kept_apart, self.anchors = np.sort(order[:num_kept]), np.sort(order[num_kept:])

    def build_engines(self) -> list[Engine]:
        """See Method."""
        return [self.context.engine(0, self._with_heads)]

    def _with_heads(self, network: Network) -> Network:
        """Several clusterings, one head's outputs after the other's."""
        num_outputs = self.settings.num_heads * self.context.train.num_classes
        network.backbone.requires_grad_(not self.settings.head_only)
        return network.add("cluster", nn.Linear(network.num_features, num_outputs)).drop("classify")

    def start(self) -> None:
        """Take over the pretext's backbone."""
        state = load_file(self.context.products["pretext"] / "weights" / "last.pt")["networks"][0]
        backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
        self.engines[0].model.load_state_dict(backbone, strict=False)

    def phases(self) -> list[Phase]:
        """See Method."""
        return [Phase("cluster", self.settings.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        context = self.context
        return [
            NeighbourPass(
                context,
                0,
                self.engines[0],
                epoch,
                batch_size=self.settings.batch_size,
                lambda_e=self.settings.lambda_e,
                num_heads=self.settings.num_heads,
                rate=context.learning_rate,
                population=self.anchors,
                backbone="stays" if self.settings.head_only else "learns",
            )
        ]

    def evaluation(self, epoch: int) -> list[Pass]:
        """See Method."""
        return [ValidationPass(self), ClusterEvaluationPass(self.context, self.predictors())]

    def predictors(self) -> list[Predictor]:
        """The best head."""
        return [lambda images: self.all_logits(images)[:, self.best_head]]

    def all_logits(self, images: Tensor) -> Tensor:
        """Logits (b, num_heads, C), in eval mode, no gradient."""
        (logits,) = self.engines[0].evaluate(images, "cluster")
        return logits.view(len(logits), self.settings.num_heads, -1)

    def weights(self) -> list[dict[str, Tensor]]:
        """A classifier with the best head."""
        network, num_classes = self.engines[0].evaluated, self.context.train.num_classes
        rows = slice(self.best_head * num_classes, (self.best_head + 1) * num_classes)
        head = {f"head.{key}": value[rows].clone() for key, value in network.heads["cluster"].state_dict().items()}
        return [network.classifier_state() | head]

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        return super().state_dict() | {"best_head": self.best_head, "num_scored": _NUM_SCORED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        if state.get("num_scored") != _NUM_SCORED:
            raise UserError(
                f"{self.context.config.run.dir} was begun when SCAN's score of an epoch was another (nldist 0.1); "
                "delete it and run the stage again, or end it with nldist 0.1"
            )
        super().load_state_dict(state)
        self.best_head = state["best_head"]


class ValidationPass(Pass):
    """SCAN's loss on images kept apart: over each image itself and 5 neighbours of it, and the entropy of all of them.

    That the image itself counts is the authors' code (docs/scanmix.md).
    """

    trains = False
    name = "validate"

    def __init__(self, method: Scan) -> None:
        self._context, self._method = method.context, method
        batch_size = method.context.config.train.eval_batch_size // (_NUM_SCORED - 1) or 1
        self.batch = {"anchors": batch_size, "neighbours": batch_size * (_NUM_SCORED - 1)}
        self.num_samples = len(method.kept_apart)

    def plan(self) -> Plan:
        """See Pass."""
        world = self._context.world
        return nearest(
            len(self._context.train),
            graph_path(self._context),
            _NUM_SCORED - 1,
            rank=world.rank,
            size=world.size,
            batch_size=self.batch["anchors"],
            population=self._method.kept_apart,
        )

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        # Of every head: the sum of predictions, the sum of agreements, and how many of each.
        shape = (self._method.settings.num_heads, self._context.train.num_classes + 3)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=self._context.world.device)

    def resume_step(self, num_done: int) -> int | None:
        """It is short: it starts again."""
        return 0

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        anchors, partners = batches["anchors"], batches["neighbours"]
        if len(anchors) and len(partners):
            log_p, log_n = (
                self._method.all_logits(self._context.fixed_view(batch)).double().log_softmax(2)
                for batch in (anchors, partners)
            )
            place, found = find(partners.draws, anchors.draws)
            agreements = torch.cat([agreement(log_p, log_p), agreement(log_p[place[found]], log_n[found])])
            num_classes = log_p.shape[2]
            self._sums[:, :num_classes] += log_p.exp().sum(0)
            self._sums[:, num_classes] += agreements.sum(0)
            self._sums[:, num_classes + 1] += len(anchors)
            self._sums[:, num_classes + 2] += len(agreements)
        return {}

    def finish(self) -> Metrics:
        """The score is the negative loss of the best head: higher is better."""
        sums = self._context.world.all_reduce(self._sums)
        agreements, num_anchors, num_pairs = sums[:, -3], sums[:, -2].clamp_min(1), sums[:, -1].clamp_min(1)
        mean = (sums[:, :-3] / num_anchors[:, None]).clamp_min(1e-8)
        entropies = -(mean * mean.log()).sum(1)
        scores = agreements / num_pairs + entropies
        best = self._method.best_head = int(scores.argmax())
        return {"validation_score": float(scores[best]), "validation_entropy": float(entropies[best])}


class ClusterEvaluationPass(EvaluationPass):
    """Accuracy after the best matching of clusters to classes (Kuhn 1955), in percent."""

    def finish(self) -> Metrics:
        """See Pass."""
        metrics = super().finish()
        confusion = self.confusion.cpu().numpy()
        from scipy.optimize import linear_sum_assignment  # takes a second, and one rank needs it

        rows, columns = linear_sum_assignment(-confusion)
        matched = 100 * int(confusion[rows, columns].sum()) / max(int(confusion.sum()), 1)
        return {"cluster_accuracy": matched, "num_evaluated": metrics["num_evaluated"]}


def _recipe(config: Config) -> Recipe:
    section = config.cluster
    assert section is not None
    return Recipe(section.epochs, section.batch_size, section.optim, config.view(section.view), config.views.eval)


def _views(config: Config) -> dict[str, Any]:
    assert config.cluster is not None
    return {"cluster.view": config.cluster.view, "views.eval": config.views.eval}


def _num_kept(settings: ClusterSection, num_samples: int) -> int:
    return max(round(settings.holdout * num_samples), 1)


def _check(config: Config, data: Data, world_size: int) -> None:
    assert config.cluster is not None
    num_anchors = len(data.train) - _num_kept(config.cluster, len(data.train))
    if num_anchors < 2 * world_size:
        told = f"cluster.holdout={config.cluster.holdout} leaves {num_anchors} anchors for {world_size} rank(s)"
        raise UserError(f"{told}; lower it")


CLUSTER = Stage("cluster", _recipe, Scan, needs=("pretext", "mine"), settings=("cluster.",), views=_views, check=_check)
