"""What a method's step is given is enough for LEND's, which reads and writes rows of its samples within a step."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.config.file import load_config
from nldist.dist.engine import Engine
from nldist.dist.world import World
from nldist.losses import one_hot
from nldist.passes.base import Pass
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase
from nldist.passes.supervised import Step, SupervisedPass
from nldist.train.run_pass import run_pass
from tests.contexts import open_context, task_of
from tests.jobs import DIGITS
from tests.ranks import run_ranks


class Sketch(Method):
    """LEND (MLJ 2022, arXiv 2206.13025), of which only the loss is whole: not the method that users will have."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.diluted = context.table.add("diluted", torch.float32, (context.train.num_classes,), on="device")

    def phases(self) -> list[Phase]:
        return [Phase("train", self.context.recipe.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, self._kept)]

    def _kept(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        self.values = self.loss(engine, step)
        return self.values

    def loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        logits, features = engine.forward((step.images, "classify", "features"))
        given = one_hot(step.labels, self.context.train.num_classes)
        observed = given if step.epoch < 2 else 0.9 * given + 0.1 * self.diluted[step.ids]
        spread, w = observed, affinity(features.detach(), 8)
        for _ in range(3):
            spread = 0.99 * w @ spread + 0.01 * spread
        spread = F.normalize(spread, p=1, dim=1)
        self.diluted[step.ids] = spread
        trust = spread.gather(1, step.labels[:, None])[:, 0]
        loss = (trust * F.cross_entropy(logits, step.labels, reduction="none")).mean()
        return {"loss": loss, "trust": trust.mean()}


def affinity(features: Tensor, k: int) -> Tensor:
    """The normalised graph of each row's k nearest others in the batch (b, b)."""
    nearest = torch.cdist(features, features).fill_diagonal_(torch.inf).topk(k, largest=False).indices
    edges = torch.zeros(len(features), len(features)).scatter_(1, nearest, 1.0)
    a = edges * (features @ features.T / len(features)).clamp_min(0) ** 3
    w = a @ a.T
    scale = w.sum(1).rsqrt().nan_to_num(posinf=0.0)
    return scale[:, None] * w * scale


def train(world: World, digits: Path) -> tuple[np.ndarray, dict[str, float], np.ndarray]:
    """After three epochs: all diluted labels, the last step's values, the given labels."""
    settings = [f"data.root={digits}", "method.name=cross_entropy", "train.epochs=3", "train.batch_size=64"]
    method = Sketch(open_context(load_config(DIGITS, settings), world))
    context = method.context
    for epoch in range(3):
        run_pass(context, task_of(method, epoch, "net0"))
    values = {name: float(value) for name, value in method.values.items()}
    return method.diluted.gather(), values, context.labels


def test_lend_s_loss_is_ten_lines_on_any_number_of_ranks(digits: Path) -> None:
    for size in (1, 2, 3):
        for diluted, values, labels in run_ranks(train, size, digits):
            np.testing.assert_allclose(diluted.sum(1), 1, atol=1e-5)  # every sample's row was written
            assert set(values) == {"loss", "trust"}
            trust = diluted[np.arange(len(labels)), labels].mean()
            assert trust > 0.11, "a sample's own label counts among its neighbours'"
