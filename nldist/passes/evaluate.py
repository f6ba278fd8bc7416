"""Accuracy on the evaluation split, or on the test split."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nldist.data.plan import Plan
from nldist.errors import UserError
from nldist.models.network import Predictor
from nldist.passes.base import Batches, Metrics, Pass
from nldist.passes.context import Context


class EvaluationPass(Pass):
    """Accuracy of networks together, and of each, every image once.

    Args:
        context: of the run.
        predictors: of each network. Together they predict the class with the largest sum of logits (DivideMix's code).
        split: "evaluation", or "test", whose metrics are called test_accuracy and so on.
    """

    trains = False

    def __init__(self, context: Context, predictors: Sequence[Predictor], split: str = "evaluation") -> None:
        self.context, self._predictors, self.split = context, predictors, split
        self.name, self._prefix = ("test", "test_") if split == "test" else ("evaluate", "")
        self.batch = {"all": context.config.train.eval_batch_size}
        self.num_samples = len(context.data.index(split))

    def plan(self) -> Plan:
        """See Pass."""
        return self.context.sweep(self.num_samples)

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        num_classes, device = self.context.train.num_classes, self.context.world.device
        self.confusion = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)
        self._top5 = torch.zeros(1, dtype=torch.int64, device=device)
        self._right = torch.zeros(len(self._predictors), dtype=torch.int64, device=device)  # of each network

    def resume_step(self, num_done: int) -> int | None:
        """An evaluation is short: it starts again."""
        return 0

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        batch = batches["all"]
        if len(batch.ids):
            images = self.context.fixed_view(batch)
            each = torch.stack([predict(images) for predict in self._predictors])
            logits, num_classes = each.sum(0), each.shape[2]
            best = logits.topk(min(5, num_classes)).indices
            pairs = (batch.labels * num_classes + best[:, 0]).bincount(minlength=num_classes**2)
            self.confusion += pairs.view(num_classes, num_classes)
            self._top5 += (best == batch.labels[:, None]).sum()
            self._right += (each.argmax(2) == batch.labels).sum(1)
        return {}

    def finish(self) -> Metrics:
        """Accuracies in percent; `confusion` then holds the counts (true class, predicted class) of all ranks."""
        world = self.context.world
        confusion, top5, right = map(world.all_reduce, (self.confusion, self._top5, self._right))
        total = int(confusion.sum())
        if total == 0:
            raise UserError(f"split {self.context.data.index(self.split).split} has no readable image to evaluate on")
        counts = {"accuracy": int(confusion.trace()), "accuracy_top5": int(top5)}
        if len(right) > 1:
            counts |= {f"accuracy{number}": count for number, count in enumerate(right.tolist())}
        found: Metrics = {name: 100 * count / total for name, count in counts.items()}
        return {self._prefix + name: value for name, value in (found | {"num_evaluated": total}).items()}
