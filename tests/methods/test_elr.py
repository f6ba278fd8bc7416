from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nldist.dist.world import World
from nldist.train.run_pass import run_pass
from tests.contexts import task_of
from tests.methods.baselines import PLAIN, assert_descended, build, one_step
from tests.ranks import run_ranks


def test_one_step_against_the_equations(digits: Path) -> None:
    """Equation 6 and the targets of section 4.2, in NumPy; the second step begins from targets that are not zero."""
    method = build(digits, "elr", "method.elr.beta=0.6", "method.elr.lambda_elr=2.5", *PLAIN)
    kept = np.random.default_rng(0).dirichlet(np.ones(10), 1437) * 0.8
    method.targets.rows.copy_(torch.from_numpy(kept))
    done = one_step(method, task_of(method, 3, "net0"), number=1)
    logits = done.models[0].logits(done.images)
    p = logits.softmax(1).detach().numpy().astype(np.float64).clip(1e-4, 1 - 1e-4)
    targets = 0.6 * kept[done.ids] + 0.4 * p / p.sum(1, keepdims=True)
    np.testing.assert_allclose(method.targets[done.ids], targets, rtol=1e-4)
    others = np.delete(np.arange(1437), done.ids)
    np.testing.assert_allclose(method.targets.rows[others], kept[others], rtol=1e-6)
    regulariser = np.log(1 - (targets * p).sum(1)).mean()
    cross_entropy = -np.log(p[np.arange(len(p)), done.labels]).mean()
    np.testing.assert_allclose(done.values["regulariser"], regulariser, rtol=1e-4)
    np.testing.assert_allclose(done.values["loss"], cross_entropy + 2.5 * regulariser, rtol=1e-3)

    fixed = torch.from_numpy(targets).float()
    product = (fixed * logits.softmax(1).clamp(1e-4, 1 - 1e-4)).sum(1)
    loss = F.cross_entropy(logits, done.labels) + 2.5 * torch.log(1 - product).mean()
    assert_descended(done.models[0], method.engines[0].model, loss, 0.02)


def test_certain_predictions_stay_finite(digits: Path) -> None:
    """As where p and t are both one-hot: 1 - <p, t> is 0 without the clip."""
    method = build(digits, "elr")
    head = method.engines[0].model.heads["classify"]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.zero_()[3] = 1e4
    method.targets.rows[:, 3] = 1
    values = one_step(method, task_of(method, 0, "net0")).values
    assert all(value.isfinite() for value in values.values())
    assert all(p.isfinite().all() for p in method.engines[0].model.parameters())


def targets_of_an_epoch(world: World, digits: Path) -> np.ndarray:
    """All targets after an epoch of a network that stays what it is, and whose batch norm uses its averages."""
    method = build(digits, "elr", "optim.lr=1e-30", "optim.weight_decay=0", "optim.lr_rule=none", world=world)
    (engine,) = method.engines
    engine.model.eval()
    engine.model.train = lambda mode=True: engine.model
    for epoch in range(2):
        run_pass(method.context, task_of(method, epoch, "net0"))
    targets: np.ndarray = method.targets.gather()
    return targets


def test_targets_are_the_same_on_any_number_of_ranks(digits: Path) -> None:
    """1,437 samples do not divide by 2; each row is updated exactly once per epoch, whatever its batch."""
    (alone,) = run_ranks(targets_of_an_epoch, 1, digits)
    np.testing.assert_allclose(alone.sum(1), 1 - 0.7**2, rtol=1e-5)
    for size in (2, 3):
        for targets in run_ranks(targets_of_an_epoch, size, digits):
            np.testing.assert_allclose(targets, alone, rtol=1e-4, atol=1e-7)


def test_the_targets_are_its_verdicts(digits: Path) -> None:
    method = build(digits, "elr")
    method.targets.rows[:2] = torch.tensor([[0.1] * 3 + [0.2] + [0.0] * 6, [0.0] * 10])
    method.context.labels[0] = 1
    verdicts = method.verdicts()
    assert verdicts.suggested[:2].tolist() == [3, -1]
    np.testing.assert_allclose(verdicts.clean_probability[:2], [0.2, np.nan], rtol=1e-6)
