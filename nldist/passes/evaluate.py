"""Accuracy on the evaluation split."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nldist.data.plan import Plan
from nldist.errors import UserError
from nldist.passes.base import Batches, Metrics, Pass
from nldist.passes.context import Context


class EvaluationPass(Pass):
    """Accuracy of a prediction on the evaluation split, every image once."""

    split = "evaluation"
    trains = False
    name = "evaluate"

    def __init__(self, context: Context, logits: Callable[[Tensor], Tensor]) -> None:
        self.context, self._logits = context, logits
        self.batch = {"all": context.config.train.eval_batch_size}
        self.num_samples = len(context.evaluation)

    def plan(self) -> Plan:
        """See Pass."""
        return self.context.sweep(len(self.context.evaluation))

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        num_classes, device = self.context.train.num_classes, self.context.world.device
        self.confusion = torch.zeros((num_classes, num_classes), dtype=torch.int64, device=device)
        self._top5 = torch.zeros(1, dtype=torch.int64, device=device)

    def resume_step(self, num_done: int) -> int | None:
        """An evaluation is short: it starts again."""
        return 0

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        batch = batches["all"]
        if len(batch.ids):
            logits = self._logits(self.context.fixed_view(batch))
            num_classes = logits.shape[1]
            best = logits.topk(min(5, num_classes)).indices
            pairs = (batch.labels * num_classes + best[:, 0]).bincount(minlength=num_classes**2)
            self.confusion += pairs.view(num_classes, num_classes)
            self._top5 += (best == batch.labels[:, None]).sum()
        return {}

    def finish(self) -> Metrics:
        """Accuracies in percent; `confusion` then holds the counts (true class, predicted class) of all ranks."""
        world = self.context.world
        confusion, top5 = world.all_reduce(self.confusion), world.all_reduce(self._top5)
        total = int(confusion.sum())
        if total == 0:
            raise UserError(f"split {self.context.evaluation.split} has no readable image to evaluate on")
        return {
            "accuracy": 100 * int(confusion.trace()) / total,
            "accuracy_top5": 100 * int(top5) / total,
            "num_evaluated": total,
        }
