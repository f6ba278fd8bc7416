from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nldist.dist.rows import Exchange, global_mean
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.pretext.moco import MoCo, MoCoPass, moco_loss
from nldist.pretext.stage import PRETEXT
from tests.pretext.make import context_of
from tests.pretext.test_gather import part
from tests.pretext.test_simclr import COUNTS, inputs, project
from tests.ranks import run_ranks

QUEUE = F.normalize(torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1)


def reference_loss(query: Tensor, key: Tensor) -> Tensor:
    """Algorithms 3.b A2 term by term (our own reference)."""
    losses = []
    for q, k in zip(query, key, strict=True):
        positive = torch.exp(q @ k / 0.2)
        losses.append(-torch.log(positive / (positive + sum(torch.exp(q @ past / 0.2) for past in QUEUE))))
    return torch.stack(losses).mean()


def loss_and_gradient(world: World, counts: tuple[int, ...]) -> tuple[float, np.ndarray]:
    views, weight = inputs(sum(counts))
    weight.requires_grad_()
    query, key = project(part(views, counts, world), weight)
    loss = global_mean(moco_loss(query, key.detach(), QUEUE, 0.2), counts, world)
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.item(), gradient.numpy()


@pytest.mark.parametrize("counts", COUNTS)
def test_loss_and_gradient_are_those_of_the_concatenated_batch(counts: tuple[int, ...]) -> None:
    views, weight = inputs(sum(counts))
    weight.requires_grad_()
    query, key = project(views, weight)
    expected = reference_loss(query, key.detach())
    (gradient,) = torch.autograd.grad(expected, weight)
    results = run_ranks(loss_and_gradient, len(counts), counts)
    assert np.mean([loss for loss, _ in results]) == pytest.approx(expected.item(), abs=1e-9)
    np.testing.assert_allclose(np.mean([g for _, g in results], axis=0), gradient, atol=1e-9)


def build(digits: Path, *overrides: str, world: World | None = None) -> MoCo:
    return MoCo(context_of(digits, "moco", *overrides, world=world))


def test_the_queue_replaces_its_oldest_keys(digits: Path) -> None:
    method = build(digits, "pretext.queue=70")
    before = method.queue.clone()
    torch.testing.assert_close(before.norm(dim=1), torch.ones(70))
    keys = F.normalize(torch.randn(120, 16), dim=1)
    method.enqueue(keys[:50])
    assert torch.equal(method.queue, torch.cat([keys[:50], before[50:]]))
    method.enqueue(keys[50:80])
    assert torch.equal(method.queue, torch.cat([keys[70:80], keys[10:70]]))
    method.enqueue(keys[80:120])
    assert torch.equal(method.queue[:50], keys[70:])
    assert method.pointer == 50


def test_a_queue_smaller_than_a_step_is_refused(digits: Path) -> None:
    def check(queue: int, world_size: int) -> None:
        context = context_of(digits, "moco", f"pretext.queue={queue}")
        PRETEXT.check(context.config, context.data, world_size)

    with pytest.raises(UserError, match=r"pretext\.queue=60 .* 64 images"):
        check(60, 1)
    check(64, 1)
    with pytest.raises(UserError, match=r"128 images \(pretext.batch_size times 2 ranks\)"):
        check(64, 2)


def test_one_step_against_the_equations(digits: Path) -> None:
    method = build(digits, "pretext.momentum=0.9", "pretext.optim.momentum=0", "pretext.optim.weight_decay=0")
    with torch.no_grad():  # a momentum encoder that is not the network
        for parameter in method.encoder.parameters():
            parameter.mul_(1.1)
    task = MoCoPass(method, 0)
    plan = task.plan()
    task.start(plan.num_steps, 0)
    batch = next(iter(method.context.stream("train", plan)))["all"]
    first, second = task.views(batch)
    assert not torch.equal(first, second)
    network, queue = method.engines[0].model, method.queue.clone()
    before = [p.detach().clone() for p in network.parameters()]
    encoder = [p.clone() for p in method.encoder.parameters()]
    (key,) = method.encoder((second, "project"))
    (query,) = network((first, "project"))
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.1
    loss = -logits.log_softmax(1)[:, 0].mean()
    gradients = torch.autograd.grad(loss, list(network.parameters()))

    metrics = task.step({"all": batch}, 0)
    torch.testing.assert_close(metrics["loss"], loss.detach())
    for old, gradient, new in zip(before, gradients, network.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.05 * gradient, atol=1e-5, rtol=1e-3)
    for old, new, follower in zip(encoder, network.parameters(), method.encoder.parameters(), strict=True):
        torch.testing.assert_close(follower, 0.9 * old + 0.1 * new)
        assert not follower.requires_grad
    torch.testing.assert_close(method.queue[: len(key)], key, atol=1e-5, rtol=1e-4)
    assert torch.equal(method.queue[len(key) :], queue[len(key) :])


def test_with_accumulation_the_momentum_encoder_moves_once_per_optimiser_step(digits: Path) -> None:
    method = build(digits, "pretext.momentum=0.5", "pretext.optim.accumulate=2")
    task = MoCoPass(method, 0)
    plan = task.plan()
    task.start(plan.num_steps, 0)
    moved = []
    for step, batches in enumerate(method.context.stream("train", plan)):
        before = [p.clone() for p in method.encoder.parameters()]
        task.step(batches, step)
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, method.encoder.parameters(), strict=True)))
        if step == 3:
            break
    assert moved == [False, True, False, True]


def test_its_state_survives_a_checkpoint(digits: Path) -> None:
    method, other = build(digits, "pretext.momentum=0.5"), build(digits, "run.seed=1")
    task = MoCoPass(method, 0)
    plan = task.plan()
    task.start(plan.num_steps, 0)
    task.step(next(iter(method.context.stream("train", plan))), 0)
    for key, value in method.encoder.state_dict().items():
        assert not torch.equal(value, other.encoder.state_dict()[key]), f"{key} tells nothing"
    other.load_state_dict(method.state_dict())
    for name, buffer in other.encoder.named_buffers():
        buffer.zero_()
        assert not torch.equal(buffer, dict(method.encoder.named_buffers())[name])
    other.load_rank_state_dict(method.rank_state_dict())
    for key, value in method.encoder.state_dict().items():
        assert torch.equal(value, other.encoder.state_dict()[key])
    assert torch.equal(method.queue, other.queue)
    assert method.pointer == other.pointer > 0


def statistics(world: World, counts: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """The mean that batch norm sees where every rank's rows hold its number, and what comes back."""
    norm = nn.BatchNorm1d(1, momentum=1.0)
    exchange = Exchange(counts, world, np.random.default_rng(world.rank))
    keys = exchange.restore(norm(exchange.shuffle(torch.full((counts[world.rank], 1), float(world.rank)))))
    assert norm.running_mean is not None
    return norm.running_mean.tolist(), keys.flatten().tolist()


def test_shuffled_batch_norm_sees_rows_of_all_ranks() -> None:
    results = run_ranks(statistics, 3, (30, 30, 30))
    for rank, (mean, keys) in enumerate(results):
        assert mean == pytest.approx([1.0]), "ten rows of each of the ranks 0, 1 and 2"
        np.testing.assert_allclose(keys, (rank - 1) / np.sqrt(2 / 3), atol=1e-4)


def train_three_steps(world: World, digits: Path) -> dict[str, np.ndarray]:
    method = build(digits, "pretext.batch_size=33", world=world)
    task = MoCoPass(method, 0)
    plan = task.plan()
    task.start(plan.num_steps, 0)
    keys: list[Tensor] = []
    enqueue = method.enqueue

    def record(rows: Tensor) -> None:
        keys.append(rows)
        enqueue(rows)

    method.enqueue = record  # type: ignore[method-assign,assignment]
    for step, batches in enumerate(method.context.stream("train", plan)):
        task.step(batches, step)
        if step == 2:
            break
    task.finish()
    buffers = torch.cat([b.flatten() for b in method.encoder.buffers() if b.is_floating_point()])
    weights = torch.cat([p.flatten() for p in method.encoder.parameters()])
    return {
        "queue": method.queue.numpy(),
        "keys": torch.cat(keys).numpy(),
        "encoder": weights.numpy(),
        "buffers": buffers.numpy(),
    }


def test_queue_and_momentum_encoder_are_the_same_on_every_rank(digits: Path) -> None:
    first, *others = run_ranks(train_three_steps, 3, digits)
    for other in others:
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value)
    num_keys = len(first["keys"])
    assert num_keys > 200, "the queue has wrapped around"
    np.testing.assert_array_equal(first["queue"][: num_keys - 200], first["keys"][200:])
    np.testing.assert_array_equal(first["queue"][num_keys - 200 :], first["keys"][num_keys - 200 : 200])
