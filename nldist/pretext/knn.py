"""k-NN accuracy: how well a training image's neighbours tell a test image's class, a measure while pre-training.

The weighted vote of Wu et al. (CVPR 2018, section 3.4): each of the k nearest training images, by cosine of
the backbone's features, votes for its label with weight exp(cosine / 0.07).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.config import PretextSection
from nldist.data.plan import Plan
from nldist.errors import UserError
from nldist.estimate.neighbours import ShardedIndex
from nldist.passes.base import Batches, Metrics, Pass
from nldist.passes.context import Context

_TEMPERATURE = 0.07

Features = Callable[[Tensor], Tensor]


def knn_passes(context: Context, features: Features, settings: PretextSection) -> list[Pass]:
    """The passes that measure the k-NN accuracy: over the training images, then over the evaluation split.

    Args:
        context: the run.
        features: (b, 3, h, w) -> (b, F), in eval mode.
        settings: knn_k and knn_samples.
    """
    bank = BankPass(context, features, settings.knn_samples)
    return [bank, QueryPass(context, features, bank, settings.knn_k)]


class BankPass(Pass):
    """Features of the training images, or of a seeded choice of them, in an index over all ranks.

    Attributes:
        index: of the images seen, once the pass has finished.
        ids: (M,) which training images those are, in the index's order.
        empty: (0, F), no features.
    """

    name = "knn_bank"
    trains = False

    def __init__(self, context: Context, features: Features, num_samples: int | None) -> None:
        self._context, self._features = context, features
        num_train = len(context.train)
        self.num_samples = min(num_samples or num_train, num_train)
        self.batch = {"all": context.config.train.eval_batch_size}

    def plan(self) -> Plan:
        """See Pass."""
        num_train, population = len(self._context.train), None
        if self.num_samples < num_train:
            generator = self._context.generator("knn_samples")
            population = np.sort(generator.choice(num_train, self.num_samples, replace=False))
        return self._context.sweep(num_train, population)

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        self._vectors: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []

    def resume_step(self, num_done: int) -> int | None:
        """The features are in no checkpoint: the pass starts again."""
        return 0

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        batch = batches["all"]
        if len(batch.ids):
            self._vectors.append(_normalised(self._features(self._context.fixed_view(batch))))
            self._ids.append(batch.ids.cpu().numpy())
        return {}

    def finish(self) -> Metrics:
        """See Pass."""
        world = self._context.world
        ids = np.concatenate([np.empty(0, np.int64), *self._ids])
        self.ids = world.all_gather(ids)
        if not len(self.ids):
            raise UserError(f"split {self._context.train.split} has no readable image to measure k-NN accuracy with")
        # A rank without a readable image has to know the width, too.
        num_features = torch.tensor(self._vectors[0].shape[1] if self._vectors else 0)
        self.empty = np.empty((0, int(world.all_reduce(num_features, "max"))), np.float32)
        self.index = ShardedIndex.build(np.concatenate([self.empty, *self._vectors]), world)
        self._vectors, self._ids = [], []
        return {}


class QueryPass(Pass):
    """Accuracy on the evaluation split of the votes of `bank`'s images."""

    name = "knn"
    split = "evaluation"
    trains = False

    def __init__(self, context: Context, features: Features, bank: BankPass, k: int) -> None:
        self._context, self._features, self._bank, self._k = context, features, bank, k
        self.batch = {"all": context.config.train.eval_batch_size}
        self.num_samples = len(context.evaluation)

    def plan(self) -> Plan:
        """See Pass."""
        return self._context.sweep(len(self._context.evaluation))

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        context, ids = self._context, self._bank.ids
        self._labels = {"knn_accuracy": context.labels[ids]}
        if context.clean is not None:
            self._labels["knn_accuracy_clean"] = context.clean[ids]
        self._hits = dict.fromkeys(self._labels, 0)
        self._total = 0

    def resume_step(self, num_done: int) -> int | None:
        """None: it would need the bank, which is in no checkpoint. A run resumes in the pass before."""
        return None

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        batch = batches["all"]
        queries = self._bank.empty
        if len(batch.ids):
            queries = _normalised(self._features(self._context.fixed_view(batch)))
        scores, places = self._bank.index.search(queries, self._k)
        truth = batch.labels.cpu().numpy()
        for name, labels in self._labels.items():
            predicted = vote(scores, labels[places], self._context.train.num_classes)
            self._hits[name] += int((predicted == truth).sum())
        self._total += len(truth)
        return {}

    def finish(self) -> Metrics:
        """Accuracies in percent, by the given labels and, where known, by the true ones."""
        counts = torch.tensor([*self._hits.values(), self._total])
        *hits, total = self._context.world.all_reduce(counts).tolist()
        if not total:
            raise UserError(f"split {self._context.evaluation.split} has no readable image to evaluate on")
        return {name: 100 * number / total for name, number in zip(self._hits, hits, strict=True)}


def vote(scores: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The class with the most votes, int64 (b,); the smaller one of two that are equal.

    Args:
        scores: (b, k), cosines; -inf has no vote.
        labels: int (b, k), the neighbours' labels.
        num_classes: number of classes C.
    """
    votes = np.zeros((len(scores), num_classes))
    np.add.at(votes, (np.arange(len(scores))[:, None], labels), np.exp(scores / _TEMPERATURE))
    return np.asarray(votes.argmax(1))


def _normalised(features: Tensor) -> np.ndarray:
    vectors: np.ndarray = F.normalize(features.float(), dim=1).cpu().numpy()
    return vectors
