from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.config.file import load_config
from nldist.data.plan import Plan
from nldist.data.stream import Batch, Stream
from nldist.dist.world import World
from nldist.methods.divide_pass import DividePass
from nldist.methods.dividemix import DivideMix
from nldist.models import Network
from nldist.passes.evaluate import EvaluationPass
from nldist.train.run_pass import run_pass
from tests.conftest import REPOSITORY
from tests.contexts import open_context, task_of
from tests.ranks import run_ranks


def build(digits: Path, *overrides: str, world: World | None = None) -> DivideMix:
    overrides = (f"data.root={digits}", "train.epochs=20", "train.batch_size=32", *overrides)
    config = load_config(REPOSITORY / "tests" / "digits.yaml", overrides)
    return DivideMix(open_context(config, world))


def batches(method: DivideMix, plan: Plan) -> list[dict[str, Batch]]:
    return list(Stream(method.context.train, method.context.labels, plan))


def set_clean(method: DivideMix, number: int, probability: np.ndarray) -> None:
    method.context.table[f"clean{number}"].numpy()[:] = probability


def test_each_network_trains_on_its_peer_s_division(digits: Path) -> None:
    method = build(digits)
    n = len(method.context.train)
    first_clean = (np.arange(n) % 3 == 0).astype(np.float32)
    set_clean(method, 0, first_clean)
    set_clean(method, 1, 1 - first_clean)
    for number, clean in ((0, 1 - first_clean), (1, first_clean)):
        plan = DividePass(method, number, 10).plan()
        steps = [plan.step(k) for k in range(plan.num_steps)]
        labelled = np.concatenate([s["labelled"].ids for s in steps])
        unlabelled = np.concatenate([s["unlabelled"].ids for s in steps])
        assert sorted(labelled) == np.flatnonzero(clean == 1).tolist()
        assert (clean[unlabelled] == 0).all()
        assert plan.num_steps == -(-len(labelled) // 16)


def test_samples_that_were_not_seen_are_in_neither_part(digits: Path) -> None:
    method = build(digits)
    clean = np.where(np.arange(len(method.context.train)) < 100, np.nan, 0.9)
    clean[100:200] = 0.1
    set_clean(method, 1, clean)
    plan = DividePass(method, 0, 10).plan()
    used = {int(i) for k in range(plan.num_steps) for part in plan.step(k).values() for i in part.ids}
    assert min(used) >= 100


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_an_epoch_whose_samples_all_fall_on_one_side_still_trains(probability: float, digits: Path) -> None:
    method = build(digits)
    set_clean(method, 1, np.full(len(method.context.train), probability))
    before = [p.clone() for p in method.engines[0].model.parameters()]
    task = DividePass(method, 0, 10)
    run_pass(method.context, task)
    assert task.plan().num_steps == -(-1437 // 16)
    assert any(not torch.equal(a, b) for a, b in zip(before, method.engines[0].model.parameters(), strict=True))


def reference_targets(
    own: Network, peer: Network, x: list[Tensor], u: list[Tensor], y: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    """Co-refinement and co-guessing (DivideMix, equations 3 and 4) (our own reference)."""
    own.train()
    peer.eval()
    with torch.no_grad():
        p_x = (own.logits(x[0]).softmax(1) + own.logits(x[1]).softmax(1)) / 2
        q_u = (
            own.logits(u[0]).softmax(1)
            + own.logits(u[1]).softmax(1)
            + peer.logits(u[0]).softmax(1)
            + peer.logits(u[1]).softmax(1)
        ) / 4
    q_x = w[:, None] * F.one_hot(y, 10) + (1 - w[:, None]) * p_x
    return tuple(q**2 / (q**2).sum(1, keepdim=True) for q in (q_x, q_u))  # type: ignore[return-value]


def test_one_step_against_the_equations(digits: Path) -> None:
    method = build(digits, "method.dividemix.warmup_epochs=2", "optim.weight_decay=0", "optim.momentum=0")
    rng = np.random.default_rng(0)
    set_clean(method, 1, rng.random(len(method.context.train)).astype(np.float32))
    task = DividePass(method, 0, 6)
    plan = task.plan()
    task.start(plan.num_steps, 0)
    batch = batches(method, plan)[0]
    x, u = batch["labelled"], batch["unlabelled"]
    views_x, views_u = task._views(x), task._views(u)
    assert not torch.equal(views_x[0], views_x[1])
    clean = torch.from_numpy(method.context.table["clean1"].numpy()[x.ids.numpy()])
    t_x, t_u = reference_targets(method.engines[0].model, method.engines[1].model, views_x, views_u, x.labels, clean)
    own = task._own([*views_u, *views_x])
    torch.testing.assert_close(task._refine(x, own[2:]), t_x)
    torch.testing.assert_close(task._guess(own[:2], views_u), t_u)

    images, targets = torch.cat([*views_x, *views_u]), torch.cat([t_x, t_x, t_u, t_u])
    mixed, mixed_targets = task._mix(images, targets, 2 * len(x.ids), 0)
    logits = method.engines[0].model.train().logits(mixed)
    p, half = logits.softmax(1), 2 * len(x.ids)
    loss_x = -(mixed_targets[:half] * logits[:half].log_softmax(1)).sum(1).mean()
    loss_u = ((p[half:] - mixed_targets[half:]) ** 2).mean()
    prior = sum(0.1 * torch.log(0.1 / p.mean(0)[c]) for c in range(10))
    loss = loss_x + 25 * (6 - 2) / 16 * loss_u + prior
    gradients = torch.autograd.grad(loss, list(method.engines[0].model.parameters()))

    before = [q.detach().clone() for q in method.engines[0].model.parameters()]
    metrics = task.step(batch, 0)
    torch.testing.assert_close(metrics["loss_x"], loss_x.detach())
    torch.testing.assert_close(metrics["loss_u"], loss_u.detach())
    rate = 0.02 * (1 + np.cos(np.pi * 6 / 20)) / 2
    for old, new, gradient in zip(before, method.engines[0].model.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - rate * gradient, rtol=1e-4, atol=1e-6)


def test_mixing_weights_favour_the_first_and_are_drawn_for_each_step(digits: Path) -> None:
    method = build(digits)
    task = DividePass(method, 0, 6)
    images = torch.eye(8)
    weights = []
    for step in range(200):
        mixed, _ = task._mix(images, images, 4, step)
        weights.append(mixed[0, 0].item())
        assert len(mixed) == 8
    assert min(weights) >= 0.5
    # E[max(l, 1-l)] for l ~ Beta(4, 4)
    assert np.mean([w for w in weights if w < 1]) == pytest.approx(0.637, abs=0.03)


def test_the_real_data_form_forwards_labelled_rows_only(digits: Path) -> None:
    method = build(digits, "method.dividemix.form=real")
    task = DividePass(method, 0, 6)
    mixed, targets = task._mix(torch.eye(12), torch.eye(12), 4, 0)
    assert (len(mixed), len(targets)) == (4, 4)
    partners = {
        int(row.nonzero().max()) for step in range(50) for row in task._mix(torch.eye(12), torch.eye(12), 4, step)[0]
    }
    assert max(partners) > 4, "partners come from the unlabelled rows too"
    assert set(task._losses(torch.randn(4, 10), torch.randn(4, 10).softmax(1), 4)) == {"loss_x", "prior"}


@pytest.mark.parametrize(("peers", "same"), [("parallel", True), ("sequential", False)])
def test_the_second_network_meets_the_first_as_it_was_or_as_it_is(peers: str, same: bool, digits: Path) -> None:
    method = build(digits, f"method.dividemix.peers={peers}")
    before = method.engines[0].model.head.weight.clone()
    set_clean(method, 1, np.r_[np.ones(64), np.full(len(method.context.train) - 64, np.nan)])
    run_pass(method.context, DividePass(method, 0, 10))
    task = DividePass(method, 1, 10)
    task.start(task.plan().num_steps, 0)
    assert torch.equal(task._peer.head.weight, before) == same  # type: ignore[union-attr,arg-type]
    assert not task._peer.training


def sweep_and_divide(world: World, digits: Path, weights: dict[str, Tensor], subset: bool) -> dict[str, Any]:
    """What must be the same for any number of ranks, given the same weights."""
    method = build(digits, *(["method.dividemix.subset=400"] if subset else []), world=world)
    for engine in method.engines:
        engine.model.load_state_dict(weights)
    task = task_of(method, 10, "sweep0" if subset else "sweep")
    metrics = run_pass(method.context, task)
    accuracy = run_pass(method.context, EvaluationPass(method.context, method.predictors()))["accuracy"]
    mixture = task.splits()["net0"].mixture
    assert mixture is not None
    clean = method.context.table["clean0"].gather()
    return {
        "means": mixture.means,
        "variances": mixture.variances,
        "labelled": np.flatnonzero(clean > 0.5).tolist(),
        "seen": np.flatnonzero(~np.isnan(clean)).tolist(),
        "accuracy": accuracy,
        **({"auc": metrics["split_auc0"]} if world.is_main else {}),
    }


@pytest.mark.parametrize("subset", [False, True])
def test_division_and_accuracy_are_the_same_on_1_to_4_ranks(subset: bool, digits: Path) -> None:
    method = build(digits, "data.label_set=clean")
    for epoch in range(2):
        run_pass(method.context, task_of(method, epoch, "net0"))
    weights = method.engines[0].model.state_dict()
    alone = sweep_and_divide(World.single(), digits, weights, subset)
    assert alone["accuracy"] > 50
    assert 0.6 < alone["auc"] < 1
    assert len(alone["seen"]) == (400 if subset else 1437)
    for size in (2, 3, 4):
        for result in run_ranks(sweep_and_divide, size, digits, weights, subset):
            np.testing.assert_allclose(result.pop("means"), alone["means"], atol=1e-6)
            np.testing.assert_allclose(result.pop("variances"), alone["variances"], atol=1e-6)
            assert result == {key: alone[key] for key in result}
