"""DeepSpeed against DDP, with the same weights and batches, in real processes.

float32, so the tolerance is that of sums in another order: 1e-6 of losses about 1, 1e-6 of weights below 1.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nldist.config import Config
from nldist.dist.build_engine import build_engine
from nldist.dist.deepspeed_settings import deepspeed_settings
from nldist.dist.engine import Backbone, Engine
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.models import Network
from tests.networks import Flat, Plain
from tests.ranks import run_ranks

STAGES = [0, 1, 2]
Weights = list[np.ndarray]


def config(
    own: Path | None = None, stage: int | None = None, train: dict[str, Any] | None = None, **optim: Any
) -> Config:
    """DDP, or DeepSpeed at a stage."""
    engine: dict[str, Any] = {} if stage is None else {"name": "deepspeed", "zero_stage": stage}
    if own is not None:
        engine["config"] = own
    values = {"data": {"root": "x"}, "views": {"train": [], "eval": []}, "optim": optim, "engine": engine}
    return Config.model_validate(values | {"train": {"epochs": 10} | (train or {})})


def network(number: int) -> nn.Module:
    """With sizes that no number of ranks divides."""
    torch.manual_seed(number)
    stem = [nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()]
    return Plain(nn.Sequential(*stem, nn.Linear(5 * 16, 7), nn.Linear(7, 3)))


def batch(step: int, world: World) -> tuple[Tensor, Tensor]:
    """This rank's part of a step's images and labels."""
    generator = torch.Generator().manual_seed(step)
    images, labels = torch.randn(12, 3, 6, 6, generator=generator), torch.randint(3, (12,), generator=generator)
    return images[world.rank :: world.size], labels[world.rank :: world.size]


def descend(
    engine: Engine, world: World, step: int, outputs: tuple[str, ...] = (), backbone: Backbone = "learns"
) -> float:
    images, labels = batch(step, world)
    loss = F.cross_entropy(engine.forward((images, *outputs), backbone=backbone)[0], labels)
    engine.step(loss, 0.1 / (1 + step))
    return loss.item()


def weights_of(model: nn.Module) -> Weights:
    return [p.detach().numpy().copy() for p in model.parameters()]


def side_by_side(world: World, settings: Config, num_steps: int) -> tuple[list[float], Weights]:
    """Losses of two networks that take turns, and the weights after them."""
    engines = [build_engine(network(number), settings, world) for number in (0, 1)]
    for engine in engines:
        engine.start_pass(num_steps, 0)
    losses = [descend(engine, world, step) for step in range(num_steps) for engine in engines]
    for engine in engines:
        engine.finish_pass()
    return losses, [weight for engine in engines for weight in weights_of(engine.model)]


def assert_close(got: tuple[list[float], Weights], want: tuple[list[float], Weights]) -> None:
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-6)
    for weight, wanted in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(weight, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "stage"), [(1, 2), (2, 0), (2, 1), (2, 2), (3, 2)])
def test_two_networks_have_the_losses_of_ddp(size: int, stage: int) -> None:
    expected = run_ranks(side_by_side, size, config(), 20)
    for got, want in zip(run_ranks(side_by_side, size, config(None, stage), 20), expected, strict=True):
        assert_close(got, want)


OPTIMISERS: list[dict[str, Any]] = [
    {"accumulate": 3, "clip_norm": 0.1},  # the last group of 5 steps is short
    {"name": "adam", "clip_norm": 0.5},
    {"momentum": 0.0, "weight_decay": 0.0},
]


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_clipping_and_optimisers_are_those_of_ddp(stage: int) -> None:
    for optim in OPTIMISERS:
        expected = run_ranks(side_by_side, 2, config(**optim), 5)
        results = run_ranks(side_by_side, 2, config(None, stage, **optim), 5)
        for got, want in zip(results, expected, strict=True):
            assert_close(got, want)


def in_pairs(world: World, settings: Config) -> tuple[list[float], Weights]:
    """Steps of two forwards each."""
    engine = build_engine(network(0), settings, world)
    engine.start_pass(4, 0)
    losses = []
    for step in range(4):
        (one, labels), (other, _) = batch(step, world), batch(step + 10, world)
        first, second = engine.forward((one,), (other[:-1],))
        loss = F.cross_entropy(first, labels) + second.square().mean()
        engine.step(loss, 0.1)
        losses.append(loss.item())
    return losses, weights_of(engine.model) + [b.numpy().copy() for b in engine.model.buffers()]


@pytest.mark.parametrize("stage", STAGES)
def test_steps_of_two_forwards_are_those_of_ddp(stage: int) -> None:
    expected = run_ranks(in_pairs, 2, config())
    for got, want in zip(run_ranks(in_pairs, 2, config(None, stage)), expected, strict=True):
        assert_close(got, want)


def in_parts(world: World, settings: Config) -> tuple[list[float], Weights]:
    """A network of which a step leaves out the second head, then the backbone too, then the first head."""
    torch.manual_seed(0)
    backbone = Flat(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 16, 7))
    model = Network(backbone, 7, classify=nn.Linear(7, 3), cluster=nn.Linear(7, 3))
    engine = build_engine(model, settings, world, partly=True)
    engine.start_pass(9, 0)
    asked: list[tuple[str, Backbone]] = [("classify", "learns"), ("classify", "follows"), ("cluster", "learns")]
    losses = [descend(engine, world, step, (head,), how) for step, (head, how) in enumerate(asked * 3)]
    return losses, weights_of(engine.model)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optim", [{"clip_norm": 0.3}, {"name": "adam"}])
def test_what_a_step_leaves_out_stays_as_it_is(stage: int, optim: dict[str, Any]) -> None:
    expected = run_ranks(in_parts, 2, config(**optim))
    for got, want in zip(run_ranks(in_parts, 2, config(None, stage, **optim)), expected, strict=True):
        assert_close(got, want)


State = dict[str, Any]


def interrupted(world: World, settings: Config) -> tuple[State, State]:
    """Rank 0's state after 2 steps and after all 5."""
    engine = build_engine(network(0), settings, world)
    engine.start_pass(5, 0)
    states = []
    for step in range(5):
        descend(engine, world, step)
        states.append(copy.deepcopy(engine.state_dict()))
    return states[1], states[4]


def resumed(world: World, settings: Config, state: State) -> State:
    """Rank 0's state after all 5 steps, of which the last 3 went on from `state`."""
    engine = build_engine(network(1), settings, world)
    engine.load_state_dict(copy.deepcopy(state))  # processes share the memory of tensors that they send
    engine.start_pass(5, 2)
    for step in range(2, 5):
        descend(engine, world, step)
    return engine.state_dict()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("optim", [{}, {"name": "adam"}])
def test_a_state_goes_on_under_every_engine(stage: int, optim: dict[str, Any]) -> None:
    ddp, other = config(**optim), config(None, stage, **optim)
    (ddp_state, ddp_end), (state, end) = (run_ranks(interrupted, 2, settings)[0] for settings in (ddp, other))
    assert_same_state(end, ddp_end, 1e-6)
    assert_same_state(run_ranks(resumed, 2, other, ddp_state)[0], ddp_end, 1e-6)
    assert_same_state(run_ranks(resumed, 2, ddp, state)[0], ddp_end, 1e-6)
    assert_same_state(run_ranks(resumed, 2, other, state)[0], end, 0)
    of_three, ddp_of_three = (run_ranks(resumed, 3, settings, state)[0] for settings in (other, ddp))
    assert_same_state(of_three, ddp_of_three, 1e-6)


def assert_same_state(got: State, want: State, tolerance: float) -> None:
    for name, value in want["model"].items():
        if "running" not in name:  # batch norm's statistics are each rank's own within a pass
            torch.testing.assert_close(got["model"][name], value, rtol=0, atol=tolerance)
    assert got["optimizer"]["state"].keys() == want["optimizer"]["state"].keys()
    for number, values in want["optimizer"]["state"].items():
        assert values.keys() == got["optimizer"]["state"][number].keys()
        for key, value in values.items():
            torch.testing.assert_close(got["optimizer"]["state"][number][key], value, rtol=0, atol=tolerance)


def predictions(world: World, settings: Config) -> Weights:
    """Logits after a pass: rank r predicts r times."""
    engine = build_engine(network(0), settings, world)
    engine.start_pass(3, 0)
    for step in range(3):
        descend(engine, world, step)
    engine.finish_pass()
    images, _ = batch(9, World.single())
    return [engine.evaluate(images)[0].numpy() for _ in range(world.rank)]


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_predict_different_numbers_of_times_agree_with_ddp(stage: int) -> None:
    for train in ({}, {"ema_decay": 0.5}):
        expected = run_ranks(predictions, 3, config(train=train))[2][0]
        results = run_ranks(predictions, 3, config(None, stage, train))
        assert [len(logits) for logits in results] == [0, 1, 2]
        for logits in (*results[1], *results[2]):
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def in_bf16(world: World, settings: Config) -> tuple[list[float], Weights]:
    engine = build_engine(network(0), settings, world)
    engine.start_pass(4, 0)
    losses = [descend(engine, world, step) for step in range(4)]
    assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    return losses, [engine.predict((batch(9, world)[0],))[0].numpy()]


@pytest.mark.parametrize("stage", STAGES)
def test_autocast_is_that_of_ddp(stage: int) -> None:
    train = {"autocast": "bf16"}
    exact = run_ranks(in_bf16, 2, config())[0]
    (want, _), (got, _) = (
        run_ranks(in_bf16, 2, settings)[0] for settings in (config(train=train), config(None, stage, train))
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert np.abs(np.array(got) - exact[0]).max() > 1e-4


@pytest.mark.parametrize(
    ("content", "stage", "complaint"),
    [
        ("{", 2, "is not valid JSON"),
        ("[1]", 2, "must hold an object"),
        ('{"train_batch_size": 8}', 2, "leave out train_batch_size, which train.batch_size"),
        ('{"optimizer": {"type": "Adam"}}', 0, "leave out optimizer, which optim.name"),
        ('{"bf16": {"enabled": true}}', 0, "leave out bf16, which train.autocast"),
        ('{"zero_optimization": {"stage": 1}}', 1, "leave out zero_optimization.stage"),
        ('{"zero_optimization": {"reduce_scatter": false}}', 0, "engine.zero_stage=0"),
    ],
)
def test_own_settings_that_contradict_the_run_are_refused(
    content: str, stage: int, complaint: str, tmp_path: Path
) -> None:
    file = tmp_path / "own.json"
    file.write_text(content)
    own = config(file, stage)
    with pytest.raises(UserError, match=complaint) as caught:
        deepspeed_settings(own.engine, own.optim, 10)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def refusal(world: World, settings: Config) -> str:
    try:
        build_engine(network(0), settings, world)
    except UserError as error:
        return str(error)
    return ""


def test_what_deepspeed_refuses_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"zero_optimization": {"reduce_buckets": 1}}')
    for told in run_ranks(refusal, 2, config(file, 2)):
        assert told.startswith(f"DeepSpeed refuses engine.config {file}: ")
        assert "reduce_buckets" in told
        assert "\n" not in told
