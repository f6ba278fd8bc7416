"""A method: networks, per-sample state, and the phases of epochs that train them. A stage: a method's run."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nldist.config import Config, Recipe
from nldist.config.marks import naming
from nldist.dist.engine import Engine
from nldist.models.network import Predictor
from nldist.passes.base import Pass
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.evaluate import EvaluationPass

_VERSION = 1  # of what stages compute: to be raised when the same settings come to mean something else
# Beginnings of the names of settings that decide about every stage.
_SHARED = ("run.seed", "model.", "data.mean", "data.std", "data.max_side", "data.window", "train.autocast")


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs of one kind. `passes(epoch)` takes the epoch's number in the whole run."""

    name: str
    num_epochs: int
    passes: Callable[[int], list[Pass]]


@dataclass(frozen=True)
class Verdicts:
    """What a method says of the labels of this rank's samples, by ascending id.

    Attributes:
        clean_probability: (owned,) of the given label; NaN where the method has not seen the sample.
        suggested: int (owned,), the class that the label should be; -1 where the method has not seen the sample.
    """

    clean_probability: np.ndarray
    suggested: np.ndarray


class Method(ABC):
    """Networks, per-sample columns, and the phases that train them."""

    stages: ClassVar[tuple["Stage", ...]] = ()  # before its training, in their order
    num_networks: ClassVar[int] = 1
    score: ClassVar[str] = "accuracy"  # the metric of an epoch that says which weights are best: higher is better
    uses_labels: ClassVar[bool] = True  # whether the training labels decide about what is learnt

    def __init__(self, context: Context) -> None:
        self.context = context
        self.engines = self.build_engines()

    def build_engines(self) -> list[Engine]:
        """The engines of the networks; by default of plain classifiers."""
        return [self.context.engine(number) for number in range(self.num_networks)]

    def start(self) -> None:  # noqa: B027
        """Take over what the stages before left, if anything; called before the first step, not on a resume."""

    @abstractmethod
    def phases(self) -> list[Phase]:
        """The method's phases; their epochs add up to the run's."""

    @property
    def num_epochs(self) -> int:
        """Epochs in all."""
        return sum(phase.num_epochs for phase in self.phases())

    def evaluation(self, epoch: int) -> list[Pass]:
        """The passes that measure at an epoch's end: by default accuracy."""
        splits = ["evaluation", *(["test"] if self.context.data.test is not None else [])]
        return [EvaluationPass(self.context, self.predictors(), split) for split in splits]

    def verdicts(self) -> Verdicts | None:
        """What it says of the labels; None: nothing, and the losses of its networks are to say it."""
        return None

    def weights(self) -> list[dict[str, Tensor]]:
        """What weights/*.pt holds: the state of each network that is evaluated."""
        return [engine.evaluated.state_dict() for engine in self.engines]

    def predictors(self) -> list[Predictor]:
        """Of each network that `weights` has, in the evaluation view."""
        return [partial(_logits, engine) for engine in self.engines]

    def logits(self, images: Tensor) -> Tensor:
        """Logits (b, C) for prediction: the sum over the networks (DivideMix's code)."""
        return torch.stack([predict(images) for predict in self.predictors()]).sum(0)

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


def _logits(engine: Engine, images: Tensor) -> Tensor:
    return engine.evaluate(images, "classify")[0]


@dataclass(frozen=True)
class Stage:
    """A run of its own, in a directory of its own, that takes over what the stages before it left.

    Attributes:
        name: what users call it.
        recipe: how it trains, from the run's settings.
        build: its method.
        needs: the stages that it builds on.
        settings: beginnings of the names of the settings that decide about its outcome, beside the shared ones.
        views: what else decides: views under the names of the settings that choose them.
        check: refuses (UserError) settings that do not fit the data or the number of ranks, before any stage begins.
        num_bytes: that it leaves on the disk, where that grows with the data.
    """

    name: str
    recipe: Callable[[Config], Recipe]
    build: Callable[[Context], Method]
    needs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    views: Callable[[Config], dict[str, Any]] = lambda config: {}
    check: Callable[[Config, Data, int], None] = lambda config, data, world_size: None
    num_bytes: Callable[[Config, Data], int] = lambda config, data: 0

    def decides(self, config: Config) -> list[Any]:
        """What decides about its outcome, beside the images and the stages before: of plain values."""
        names = (*_SHARED, *self.settings)
        chosen = {name: value for name, value in naming(config).items() if name.startswith(names)}
        views = {name: config.view(choice) for name, choice in self.views(config).items()}
        return [_VERSION, chosen | {name: [op.model_dump(mode="json") for op in ops] for name, ops in views.items()}]
