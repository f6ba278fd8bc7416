"""A method: networks, per-sample state, and the phases of epochs that train them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.passes.base import Pass
from nldist.passes.context import Context
from nldist.passes.evaluate import EvaluationPass


@dataclass(frozen=True)
class Phase:
    """Consecutive epochs of one kind. `passes(epoch)` takes the epoch's number in the whole run."""

    name: str
    num_epochs: int
    passes: Callable[[int], list[Pass]]


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
        """Logits (b, C) for prediction: the sum over the networks (DivideMix's code)."""
        return torch.stack([engine.evaluate(images, "classify")[0] for engine in self.engines]).sum(0)

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
