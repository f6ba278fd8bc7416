import numpy as np
import pytest
import torch
from torch import nn

from nldist.config import Config
from nldist.dist.engine import DDPEngine
from nldist.dist.optimizer import batch_factor, build_optimizer, learning_rate
from nldist.dist.world import World
from tests.networks import Plain
from tests.ranks import run_ranks


def config(**optim: object) -> Config:
    values = {"data": {"root": "x"}, "views": {"train": [], "eval": []}, "train": {"epochs": 10}, "optim": optim}
    return Config.model_validate(values)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 2)).double()


IMAGES = torch.randn(24, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.randn(24, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def train(world: World, options: dict[str, object], num_batches: int) -> list[np.ndarray]:
    """Squared loss over `num_batches` steps, each rank taking its part of every batch."""
    engine = DDPEngine(Plain(network()), config(**options), world)
    engine.start_pass(num_batches, 0)
    for images, targets in zip(IMAGES.chunk(num_batches), TARGETS.chunk(num_batches), strict=True):
        mine = slice(world.rank * len(images) // world.size, (world.rank + 1) * len(images) // world.size)
        loss = (engine.forward((images[mine],))[0] - targets[mine]).square().mean()
        engine.step(loss, 0.1)
    return [p.detach().numpy() for p in engine.model.parameters()]


def reference(num_groups: int, clip: float | None, adam: bool) -> list[np.ndarray]:
    """Plain torch on one process over whole batches."""
    model = network()
    sgd: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    if adam:
        sgd = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=5e-4)
    for images, targets in zip(IMAGES.chunk(num_groups), TARGETS.chunk(num_groups), strict=True):
        sgd.zero_grad()
        (model(images) - targets).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        sgd.step()
    return [p.detach().numpy() for p in model.parameters()]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    ("options", "num_batches", "num_groups"),
    [
        ({}, 2, 2),
        ({"clip_norm": 0.1}, 2, 2),
        ({"accumulate": 2}, 4, 2),
        ({"accumulate": 3}, 2, 1),
        ({"name": "adam"}, 2, 2),
    ],
)
def test_ranks_batches_and_accumulation_give_the_gradient_of_the_whole(
    size: int, options: dict[str, object], num_batches: int, num_groups: int
) -> None:
    clip = options.get("clip_norm")
    expected = reference(num_groups, clip, "name" in options)  # type: ignore[arg-type]
    for parameters in run_ranks(train, size, options, num_batches):
        for got, want in zip(parameters, expected, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-6)


def norms() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 4, 2)).double()


def two_parts(rank: int, size: int) -> list[torch.Tensor]:
    mine = IMAGES.chunk(size)[rank]
    return [mine[:5], mine[5:]]


def several_forwards(world: World, size: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Logits, weights and buffers after a step on two batches of unequal size of each of `size` ranks."""
    engine = DDPEngine(Plain(norms()), config(momentum=0, weight_decay=0), world)
    engine.start_pass(1, 0)
    first, second = engine.forward(*((part,) for part in two_parts(world.rank, size)))
    engine.step(first.square().mean() + 2 * second.square().mean(), 0.1)
    found = ([first, second], engine.model.parameters(), engine.model.buffers())
    return tuple([value.detach().numpy() for value in values] for values in found)  # type: ignore[return-value]


@pytest.mark.parametrize("size", [1, 2])
def test_several_forwards_of_a_step_have_batch_statistics_of_their_own(size: int) -> None:
    """As if the network were called for each batch, and updated its running averages each time."""
    results = run_ranks(several_forwards, size, size)
    gradients: list[tuple[torch.Tensor, ...]] = []
    for rank, (logits, _, buffers) in enumerate(results):
        model = norms()
        outputs = [model(part) for part in two_parts(rank, size)]
        loss = outputs[0].square().mean() + 2 * outputs[1].square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        for got, want in zip(logits, outputs, strict=True):
            np.testing.assert_allclose(got, want.detach(), atol=1e-12)
        for got, buffer in zip(buffers, model.buffers(), strict=True):
            np.testing.assert_allclose(got, buffer, atol=1e-12)
    for _, weights, _ in results:
        for got, old, *parts in zip(weights, norms().parameters(), *gradients, strict=True):
            np.testing.assert_allclose(got, old.detach() - 0.1 * torch.stack(parts).mean(0), atol=1e-12)


def test_average_weights_follow_the_decay() -> None:
    values = config().model_dump() | {"train": {"epochs": 10, "ema_decay": 0.9}}
    engine = DDPEngine(Plain(network()), Config.model_validate(values), World.single())
    engine.start_pass(2, 0)
    weights = []
    for _ in range(2):
        engine.step((engine.forward((IMAGES,))[0] - TARGETS).square().mean(), 0.1)
        weights.append(next(engine.model.parameters()).detach().clone())
    # the first update copies the weights, each later one moves a tenth of the way
    expected = 0.9 * weights[0] + 0.1 * weights[1]
    assert engine.averaged is not None
    torch.testing.assert_close(next(engine.evaluated.parameters()), expected)
    assert not torch.equal(weights[0], weights[1])


def buffers_after_a_pass(world: World) -> list[float]:
    engine = DDPEngine(Plain(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))), config(), world)
    engine.start_pass(1, 0)
    engine.predict((torch.full((4, 3, 1, 1), float(world.rank)),))
    engine.finish_pass()
    mean: list[float] = engine.model.module[0].running_mean.tolist()
    return mean


def test_batch_norm_statistics_are_averaged_at_the_end_of_a_pass() -> None:
    for mean in run_ranks(buffers_after_a_pass, 3):
        np.testing.assert_allclose(mean, [0.1 * 1.0] * 3, rtol=1e-6)


def test_learning_rate_schedules() -> None:
    step = config(lr=0.02, milestones=[5, 8], warmup_epochs=2).optim
    assert [learning_rate(step, e, 10) for e in (0, 1, 2, 4.9, 5, 8)] == pytest.approx(
        [0, 0.01, 0.02, 0.02, 0.002, 0.0002]
    )
    cosine = config(lr=0.4, schedule="cosine", min_lr=4e-4).optim
    assert [learning_rate(cosine, e, 500) for e in (0, 250, 500)] == pytest.approx([0.4, 0.2002, 4e-4])
    assert learning_rate(cosine, 250.9, 500) == learning_rate(cosine, 250, 500), "by epochs, as SimCLR's authors"
    linear = config(lr=0.001, schedule="linear", milestones=[80]).optim
    rates = [learning_rate(linear, e, 200) for e in (0, 79, 80, 140.9, 199)]
    assert rates == pytest.approx([0.001, 0.001, 0.001, 0.0005, 0.001 / 120]), "as co-teaching's authors"


def test_a_cosine_restarts_as_torch_s() -> None:
    optim = config(lr=0.02, schedule="cosine", min_lr=1e-3, restart_epochs=10).optim
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(reference, T_0=10, eta_min=1e-3)
    for epoch in range(35):
        assert learning_rate(optim, epoch + 0.7, 300) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9), epoch
        reference.step()
        schedule.step()
    with pytest.raises(ValueError, match="restart_epochs is for schedule=cosine"):
        config(restart_epochs=10)


def test_the_rate_follows_the_global_batch() -> None:
    assert batch_factor(config().optim, 4096) == 1, "no rule without the batch that lr is meant for"
    assert batch_factor(config(lr_batch=128).optim, 512) == 4
    assert batch_factor(config(lr_batch=128).optim, 32) == 0.25
    assert batch_factor(config(lr_batch=128, lr_rule="sqrt").optim, 512) == 2
    assert batch_factor(config(lr_batch=128, lr_rule="none").optim, 512) == 1
    optim = config(lr=0.1, milestones=[6], lr_rule_epochs=4).optim
    rates = [learning_rate(optim, e, 10, 3.0) for e in (0, 2, 4, 6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.03]), "grown into, then the schedule's"
    assert learning_rate(optim, 0, 10, 0.5) == pytest.approx(0.05), "a smaller one at once"


@pytest.mark.parametrize(("name", "rate"), [("lars", 0.5), ("lamb", 0.01)])
def test_layerwise_optimisers_leave_biases_and_norms_out(name: str, rate: float) -> None:
    """Their decay and adaptation is for weights (You et al., arXiv 1708.03888 and 1904.00962)."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = build_optimizer(model, config(name=name, lr=rate, weight_decay=0.1).optim)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    weight, *others = [(p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True)]
    assert weight > 0, "decay"
    assert others == [0, 0, 0]


def test_lars_scales_each_layer_by_its_norms() -> None:
    """You et al., arXiv 1708.03888, equation 6 (our own reference), first step."""
    model = nn.Linear(4, 3)
    optimizer = build_optimizer(model, config(name="lars", lr=0.5, weight_decay=0.1).optim)
    weight = model.weight.detach().clone()
    gradient = torch.randn(3, 4)
    model.weight.grad = gradient.clone()
    optimizer.step()
    local = 0.001 * weight.norm() / (gradient.norm() + 0.1 * weight.norm())
    torch.testing.assert_close(model.weight.detach(), weight - 0.5 * local * (gradient + 0.1 * weight))
