"""What a method is: phases of epochs, epochs of passes, passes of steps. The trainer knows only these."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.data.plan import Plan
from nldist.data.stream import Batch
from nldist.data.views import View
from nldist.dist.engine import Engine
from nldist.errors import UserError
from nldist.estimate.mixture import Mixture
from nldist.methods.context import Context

Batches = Mapping[str, Batch]
Metrics = dict[str, Any]


class Pass(ABC):
    """A run over one plan: part of an epoch. A resumed pass is built anew and asked for its later steps.

    So `plan` may depend on nothing that the pass itself changes.
    """

    split: ClassVar[str] = "train"
    trains: ClassVar[bool] = True
    name: str
    batch: dict[str, int]  # role -> samples per step and rank, at most
    num_samples: int  # that the first role has in all, at most
    num_rows: int = 0  # images in the forward with gradient, per step and rank

    @abstractmethod
    def plan(self) -> Plan:
        """The plan of this pass, from the state at its start."""

    @abstractmethod
    def start(self, num_steps: int, start_step: int) -> None:
        """Get ready for step `start_step` of `num_steps`."""

    def usable(self, batches: Batches) -> bool:
        """Whether a training step can be made of what could be read: by default, of any image of the first role."""
        return len(next(iter(batches.values()))) > 0

    @abstractmethod
    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """Do one step; return scalar tensors to be averaged for the log."""

    def resume_step(self, num_done: int) -> int | None:
        """Where a checkpoint taken now, after `num_done` steps, would go on; None where none can be taken."""
        return num_done

    @abstractmethod
    def finish(self) -> Metrics:
        """Complete the pass; return metrics that hold for all ranks; rank 0 may have more, to report. A collective."""

    def splits(self) -> dict[str, "Split"]:
        """The divisions into clean and noisy that the finished pass made, by network."""
        return {}

    def curves(self) -> dict[str, "Curves"]:
        """Plots of the finished pass, by name."""
        return {}


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs of one kind. `passes(epoch)` takes the epoch's number in the whole run."""

    name: str
    num_epochs: int
    passes: Callable[[int], list[Pass]]


@dataclass(frozen=True)
class Split:
    """One network's division into clean and noisy, for plots: this rank's samples."""

    losses: np.ndarray  # (owned,) normalised, NaN where not seen
    clean_probability: np.ndarray  # (owned,)
    mixture: Mixture | None


@dataclass(frozen=True)
class Curves:
    """Lines for a plot: what the axes mean, and each line's points (x, y)."""

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, tuple[list[float], list[float]]]


class Method(ABC):
    """Networks, per-sample columns, and the phases that train them."""

    num_networks: ClassVar[int] = 1
    score: ClassVar[str] = "accuracy"  # the metric of an epoch that says which weights are best: higher is better
    uses_labels: ClassVar[bool] = True  # whether the training labels decide about what is learnt

    def __init__(self, context: Context) -> None:
        self.context = context
        self.engines = self.build_engines()

    def build_engines(self) -> list[Engine]:
        """The engines of the networks; by default of plain classifiers."""
        return [self.context.engine(number) for number in range(self.num_networks)]

    def check(self, world_size: int) -> None:  # noqa: B027
        """Refuse (UserError) a number of ranks that the settings do not fit."""

    def start(self) -> None:  # noqa: B027
        """Take over what the stages before left, if anything; called before the first step, not on a resume."""

    @abstractmethod
    def phases(self) -> list[Phase]:
        """The method's phases; their epochs add up to the run's."""

    def evaluation(self, epoch: int) -> list[Pass]:
        """The passes that measure at an epoch's end: by default the accuracy of `logits`."""
        return [EvaluationPass(self.context, self.logits)]

    def weights(self) -> list[dict[str, Tensor]]:
        """What weights/*.pt holds: the state of each network that is evaluated."""
        return [engine.evaluated.state_dict() for engine in self.engines]

    def logits(self, images: Tensor) -> Tensor:
        """Logits (b, C) for prediction: the sum over the networks (algorithms 0.3)."""
        return torch.stack([engine.evaluate(images) for engine in self.engines]).sum(0)

    @property
    def extra_bytes(self) -> int:
        """Device memory for what is kept beside the engines."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """State that is the same on every rank."""
        return {"engines": [engine.state_dict() for engine in self.engines]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for engine, engine_state in zip(self.engines, state["engines"], strict=True):
            engine.load_state_dict(engine_state)

    def rank_state_dict(self) -> dict[str, Any]:
        """State that differs between ranks within an epoch."""
        return {"engines": [engine.rank_state_dict() for engine in self.engines]}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `rank_state_dict` gave on the same rank."""
        for engine, engine_state in zip(self.engines, state["engines"], strict=True):
            engine.load_rank_state_dict(engine_state)


class EnginePass(Pass):
    """A pass that trains one network."""

    reads: ClassVar[bool] = False  # whether its steps use the network's weights or predictions beside the forward

    def __init__(self, context: Context, number: int, engine: Engine, epoch: int) -> None:
        self.context, self.number, self.engine, self.epoch = context, number, engine, epoch
        self.name = f"net{number}"

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        self._num_steps = num_steps
        self.engine.start_pass(num_steps, start_step, reads=self.reads)

    def resume_step(self, num_done: int) -> int | None:
        """See Pass."""
        return num_done if self.engine.at_edge else None

    def progress(self, step: int) -> float:
        """The epoch as a fraction: 3.5 is halfway through epoch 3."""
        return self.epoch + step / self._num_steps

    def descend(self, loss: Tensor, step: int) -> None:
        """One optimiser step from `loss` at the scheduled learning rate."""
        self.engine.step(loss, self.context.learning_rate(self.progress(step)))

    def finish(self) -> Metrics:
        """See Pass."""
        self.engine.finish_pass()
        return {}


class SupervisedPass(EnginePass):
    """One epoch over all samples with a loss on the given labels."""

    def __init__(
        self,
        context: Context,
        number: int,
        engine: Engine,
        epoch: int,
        loss: Callable[[Engine, Tensor, Tensor, np.random.Generator], Tensor],
        view: View | None = None,
    ) -> None:
        super().__init__(context, number, engine, epoch)
        self._loss, self._view = loss, view
        self.batch = {"all": context.config.train.batch_size}
        self.num_samples, self.num_rows = len(context.train), self.batch["all"]

    def plan(self) -> Plan:
        """See Pass."""
        return self.context.shuffled(self.epoch, self.number, self.batch["all"])

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        batch = batches["all"]
        images = self.context.view(batch, self.epoch, self.number, self._view)
        generator = self.context.generator(self.epoch, self.number, step)
        loss = self._loss(self.engine, images, batch.labels, generator)
        self.descend(loss, step)
        return {"loss": loss.detach()}


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


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (b,) as float32 rows (b, C)."""
    return F.one_hot(labels, num_classes).float()
