"""DivideMix against figures of its authors' code: tests/released/dividemix.json says which, on which inputs.

And the step on two ranks against the step on one, where the mathematics says that they are equal.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nldist.config.file import load_config
from nldist.data.stream import Batch
from nldist.dist.world import World
from nldist.methods.divide_pass import DividePass
from nldist.methods.dividemix import DivideMix
from nldist.models import Network, build_model
from tests.conftest import REPOSITORY
from tests.contexts import open_context
from tests.ranks import run_ranks

RELEASED: dict[str, Any] = json.loads((REPOSITORY / "tests" / "released" / "dividemix.json").read_text())
# The released names of what the figures are about, and ours.
NAMES = {
    "bn1": "backbone.bn1",
    "layer1.0.bn1": "backbone.stages.0.0.bn1",
    "layer4.1.conv2.weight": "backbone.stages.3.1.conv2.weight",
    "layer4.1.bn2": "backbone.stages.3.1.bn2",
}
FORMATS = [torch.contiguous_format, torch.channels_last]
SETTINGS = (
    *("model.name=preact_resnet18", "train.epochs=300", "train.batch_size=16", "optim.schedule=step", "optim.lr=0.02"),
    *("method.dividemix.warmup_epochs=10", "method.dividemix.lambda_u=25", "method.dividemix.peers=sequential"),
)


def images(k: int) -> Tensor:
    """Eight images by formula, float64 (8, 3, 32, 32)."""
    i = torch.arange(8 * 3 * 32 * 32, dtype=torch.float64)
    return torch.sin(0.001 * i * (k + 1) + 0.3 * k + 0.05 * (i % 97)).view(8, 3, 32, 32)


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    return build_model("preact_resnet18", 10)


def assert_as_released(got: Any, released: Any, dtype: torch.dtype) -> None:
    """1e-9 in float64; in float32 1e-4 of the largest figure."""
    got, released = torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(released, dtype=torch.float64)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4 * float(released.abs().max())
    torch.testing.assert_close(got, released, rtol=0, atol=tolerance)


def buffer(model: nn.Module, released_name: str) -> Tensor:
    module, _, kind = released_name.rpartition(".")
    return model.get_buffer(f"{NAMES[module]}.{kind}")[:4]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_network_is_the_released_one(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    model = network(11).to(dtype).to(memory_format=memory_format)  # type: ignore[call-overload]
    pixels = images(0).to(dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        assert_as_released(model.eval().logits(pixels), RELEASED["logits_eval"], dtype)
        assert_as_released(model.train().logits(pixels), RELEASED["logits_train"], dtype)
    for name, released in RELEASED["running_after_train_forward"].items():
        assert_as_released(buffer(model, name), released, dtype)


class Draws:
    """The mixing weight and the permutation of a step, instead of random ones."""

    def __init__(self, permutation: np.ndarray) -> None:
        self._permutation = permutation

    def beta(self, a: float, b: float) -> float:
        return 0.2  # the larger of it and its complement counts

    def permutation(self, count: int) -> np.ndarray:
        assert count == len(self._permutation)
        return self._permutation


class Step:
    """Network 0's first step of epoch 20 on given views, labels and draws; `rows` are the samples that it sees."""

    def __init__(
        self, digits: Path, dtype: torch.dtype, permutation: np.ndarray, rows: slice, world: World, *settings: str
    ) -> None:
        config = load_config(REPOSITORY / "tests" / "digits.yaml", (f"data.root={digits}", *SETTINGS, *settings))
        torch.set_default_dtype(dtype)
        try:
            self.method = DivideMix(open_context(config, world))
        finally:
            torch.set_default_dtype(torch.float32)
        for engine, seed in zip(self.method.engines, (11, 12), strict=True):
            engine.model.load_state_dict(network(seed).state_dict())
        self.model = self.method.engines[0].model
        self.task = DividePass(self.method, 0, 20)
        self.task.plan()
        self.task.start(5, 0)
        clean = torch.linspace(0.55, 0.95, 8, dtype=torch.float64)
        self.task._clean_on_device = torch.zeros(len(self.method.context.train), dtype=dtype)
        self.task._clean_on_device[:8] = clean.to(dtype)
        views = {"x": [images(1), images(2)], "u": [images(3), images(4)]}
        roles = {0: "x", 8: "u"}  # ids from 0 on are labelled
        self.task._views = lambda batch: [  # type: ignore[method-assign]
            view[rows].to(dtype) for view in views[roles[8 * int(batch.ids[0] >= 8)]]
        ]
        self.method.context.generator = lambda *key: Draws(permutation)  # type: ignore[method-assign,assignment,return-value]
        self.batches = {"labelled": batch(torch.arange(8)[rows]), "unlabelled": batch(torch.arange(8, 16)[rows])}
        self.targets: Tensor | None = None
        mix = self.task._mix

        def mixed(*args: Any) -> tuple[Tensor, Tensor]:
            inputs, self.targets = mix(*args)
            return inputs, self.targets

        self.task._mix = mixed  # type: ignore[method-assign,assignment]
        self.squares: list[Tensor] = []
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: self.squares.append(p.grad.square().sum()))

    def run(self) -> dict[str, Tensor]:
        return dict(self.task.step(self.batches, 0))


def batch(ids: Tensor) -> Batch:
    empty = torch.empty(len(ids), 0)
    return Batch(empty, empty, ids, ids, ids % 8)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_step_is_the_released_one(dtype: torch.dtype, channels_last: bool, digits: Path) -> None:
    permutation = (7 * np.arange(32) + 3) % 32
    step = Step(digits, dtype, permutation, slice(8), World.single(), f"model.channels_last={channels_last}")
    losses, released = step.run(), RELEASED["step"]
    for name in ("loss_x", "loss_u", "prior"):
        assert_as_released(losses[name], released[name], dtype)
    assert step.task._lambda_u(0) == released["lambda_u"]
    assert step.targets is not None
    assert_as_released(step.targets[0], released["mixed_target_row0"], dtype)
    assert_as_released(step.targets[16], released["mixed_target_row16"], dtype)
    assert_as_released(torch.stack(step.squares).sum().sqrt(), released["gradient_norm"], dtype)
    weights, after = released["weights"], dict(step.model.named_parameters())
    if dtype == torch.float64:  # in float32 the sum of a filter bank is mostly rounding
        assert_as_released(after["backbone.conv1.weight"].sum(), weights["conv1.weight sum"], dtype)
    filters = after[NAMES["layer4.1.conv2.weight"]][0, 0].flatten()
    assert_as_released(filters, weights["layer4.1.conv2.weight[0, 0]"], dtype)
    assert_as_released(after["head.bias"], weights["linear.bias"], dtype)
    for name, value in released["running"].items():
        assert_as_released(buffer(step.model, name), value, dtype)


def half_or_whole(world: World, digits: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights and losses of a step on 8 + 8 samples of one rank, or 4 + 4 of each of two.

    Batch norm has its running averages, and each half is mixed within itself: where ranks differ by nothing else, the
    mean of their gradients is the gradient of the whole batch.
    """
    share = 8 // world.size
    halves = np.random.default_rng(5).permutation(16), np.random.default_rng(6).permutation(16)
    rows = [place_in_whole(half) for half in (0, 1)]
    permutation = halves[world.rank]
    if world.size == 1:
        permutation = np.empty(32, np.int64)
        for own, half in zip(rows, halves, strict=True):
            permutation[own] = own[half]
    mine = slice(world.rank * share, (world.rank + 1) * share)
    step = Step(digits, torch.float64, permutation, mine, world)
    step.model.eval()
    losses = {name: float(value) for name, value in step.run().items()}
    return {name: value.detach().clone() for name, value in step.model.named_parameters()}, losses


def place_in_whole(half: int) -> np.ndarray:
    """Where the 16 rows of one half (x1, x2, u1, u2 of 4 samples) are among the 32 rows of the whole."""
    return np.concatenate([8 * view + 4 * half + np.arange(4) for view in range(4)])


def test_the_mean_of_two_ranks_gradients_is_that_of_the_whole_batch(digits: Path) -> None:
    ((expected, expected_losses),) = run_ranks(half_or_whole, 1, digits)
    results = run_ranks(half_or_whole, 2, digits)
    for weights, _ in results:
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9)
    for name, value in expected_losses.items():
        assert np.mean([losses[name] for _, losses in results]) == pytest.approx(value, abs=1e-9)
