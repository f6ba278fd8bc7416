"""What the step of a method that learns from labels is given: all that a paper's loss needs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.config.file import load_config
from nldist.dist.engine import Engine
from nldist.dist.world import World
from nldist.passes.base import Pass
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase
from nldist.passes.supervised import Step, SupervisedPass
from nldist.train.run_pass import run_pass
from tests.contexts import open_context, task_of
from tests.jobs import DIGITS
from tests.ranks import run_ranks


class Bootstrap(Method):
    """A method of one's own, whole: the given label and the mean of former predictions, half and half."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.former = context.table.add("former", torch.float32, (context.train.num_classes,))
        self.steps: list[Step] = []

    def phases(self) -> list[Phase]:
        return [Phase("train", self.context.recipe.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, self._loss)]

    def _loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        self.steps.append(step)
        (logits,) = engine.forward((step.images, "classify"))
        self.former[step.ids] = (self.former[step.ids] + logits.detach().softmax(1)) / (2 if step.epoch >= 1 else 1)
        soft = F.cross_entropy(logits, self.former[step.ids])
        return {"loss": F.cross_entropy(logits, step.labels) / 2 + soft / 2, "soft": soft}


def train(world: World, digits: Path) -> tuple[np.ndarray, np.ndarray, list[list[Step]]]:
    """After two epochs: all former predictions, the given labels, the steps by epoch."""
    settings = [f"data.root={digits}", "method.name=cross_entropy", "train.epochs=2", "train.batch_size=64"]
    method = Bootstrap(open_context(load_config(DIGITS, settings), world))
    epochs = []
    for epoch in range(2):
        method.steps = []
        run_pass(method.context, task_of(method, epoch, "net0"))
        epochs.append(method.steps)
    return method.former.gather(), method.context.labels, epochs


def test_a_method_of_ten_lines_sees_every_sample_once_an_epoch_on_any_number_of_ranks(digits: Path) -> None:
    for size in (1, 2, 3):
        results = run_ranks(train, size, digits)
        for former, labels, epochs in results:
            np.testing.assert_allclose(former.sum(1), 1, atol=1e-5)  # each row was written once in each epoch
            for epoch, steps in enumerate(epochs):
                assert [step.epoch for step in steps] == [epoch + k / len(steps) for k in range(len(steps))]
                for step in steps:
                    assert step.labels.tolist() == labels[step.ids].tolist()
                    assert step.images.shape == (len(step.ids), 3, 8, 8)
        for epoch in range(2):
            ids = torch.cat([step.ids for *_, epochs in results for step in epochs[epoch]])
            assert sorted(ids.tolist()) == list(range(1437))


def test_each_step_of_each_rank_has_randomness_of_its_own_which_a_run_repeats(digits: Path) -> None:
    def draws() -> list[float]:
        return [
            step.random.random() for *_, epochs in run_ranks(train, 2, digits) for steps in epochs for step in steps
        ]

    once = draws()
    assert len(set(once)) == len(once) == 2 * 2 * 12
    assert draws() == once
