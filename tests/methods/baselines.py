"""What tests of the baselines share: a method on the digits, and one step of one of its passes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nldist.config.file import load_config
from nldist.data.stream import Stream
from nldist.dist.world import World
from nldist.methods.build import build_method
from tests.contexts import open_context
from tests.jobs import DIGITS

# So that a step is the learning rate times the gradient.
PLAIN = ("optim.momentum=0", "optim.weight_decay=0", "optim.schedule=step")


def build(digits: Path, name: str, *overrides: str, world: World | None = None) -> Any:
    """The method on the digits with half of the labels wrong."""
    settings = [f"data.root={digits}", f"method.name={name}", "train.epochs=8", "train.batch_size=32", *overrides]
    return build_method(open_context(load_config(DIGITS, settings), world))


@dataclass
class Stepped:
    """One step: what it was given, the networks before it, what it logged."""

    ids: Tensor
    labels: Tensor
    images: Tensor
    models: list[Any]
    values: Mapping[str, Tensor]


def one_step(method: Any, task: Any, number: int = 0) -> Stepped:
    """Do step `number` of a pass, alone."""
    import copy

    plan = task.plan()
    task.start(plan.num_steps, number)
    batches = next(iter(Stream(method.context.train, method.context.labels, plan, start_step=number)))
    batch = batches["all"]
    images = method.context.view(batch, task.epoch, task.name)
    models = [copy.deepcopy(engine.model).train() for engine in method.engines]
    return Stepped(batch.ids, batch.labels, images, models, task.step(batches, number))


def assert_descended(before: Any, after: Any, loss: Tensor, rate: float) -> None:
    """The weights are those of before, less the rate times the gradient of `loss`, a function of those."""
    gradients = torch.autograd.grad(loss, list(before.parameters()))
    for old, new, gradient in zip(before.parameters(), after.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - rate * gradient, rtol=1e-4, atol=1e-6)
