from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nldist.dist.world import World
from nldist.train.run_pass import run_pass
from tests.contexts import task_of
from tests.methods.baselines import PLAIN, assert_descended, build, one_step
from tests.ranks import run_ranks

SHORT = ("method.pencil.warmup_epochs=2", "method.pencil.correction_epochs=3")


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def label_gradient(variables: np.ndarray, p: np.ndarray, labels: np.ndarray, alpha: float) -> np.ndarray:
    """Of mean_ic p log(p / y^d) + alpha mean_i CE(softmax(y^d), label), y^d = softmax(y~), by hand: (b, C)."""
    b, c = p.shape
    y = softmax(variables)
    divergence = (y - p) / (b * c)
    outer = (softmax(y) - np.eye(c)[labels]) / b
    return np.asarray(divergence + alpha * y * (outer - (outer * y).sum(1, keepdims=True)))


def test_one_step_of_the_labels_and_the_network_against_the_equations(digits: Path) -> None:
    settings = ("method.pencil.alpha=0.3", "method.pencil.beta=0.7", "method.pencil.label_lr=500")
    method = build(digits, "pencil", *SHORT, *settings, *PLAIN)
    variables = np.random.default_rng(0).normal(size=(1437, 10)) * 3
    method.variables.rows.copy_(torch.from_numpy(variables))
    done = one_step(method, task_of(method, 3, "net0"))
    logits = done.models[0].logits(done.images)
    p, y = logits.softmax(1), torch.from_numpy(softmax(variables[done.ids])).float()
    gradient = label_gradient(variables[done.ids], p.detach().double().numpy(), done.labels.numpy(), 0.3)
    expected = variables[done.ids] - 500 * len(done.ids) / 128 * gradient
    np.testing.assert_allclose(method.variables[done.ids], expected, rtol=1e-3, atol=1e-4)
    others = np.delete(np.arange(1437), done.ids)
    np.testing.assert_allclose(method.variables.rows[others], variables[others], rtol=1e-6)

    classification = (p * (p / y).log()).mean()
    compatibility = F.cross_entropy(y, done.labels)
    entropy = -(p * p.log()).mean()
    loss = classification + 0.3 * compatibility + 0.7 * entropy
    for name, value in (("loss", loss), ("classification", classification), ("entropy", entropy)):
        torch.testing.assert_close(done.values[name], value.detach(), rtol=1e-4, atol=1e-5)
    changed = (variables[done.ids].argmax(1) != done.labels.numpy()).mean()
    assert float(done.values["corrected"]) == pytest.approx(changed)
    assert_descended(done.models[0], method.engines[0].model, loss, 0.02)


def test_the_last_phase_learns_the_labels_and_leaves_them(digits: Path) -> None:
    method = build(digits, "pencil", *SHORT, "method.pencil.finetune_lr=0.4", *PLAIN, "optim.milestones=[7]")
    method.variables.rows.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=(1437, 10))))
    before = method.variables.rows.clone()
    task = task_of(method, 5, "net0")
    done = one_step(method, task)
    assert torch.equal(method.variables.rows, before)
    p, y = done.models[0].logits(done.images).softmax(1), before[done.ids].softmax(1)
    assert_descended(done.models[0], method.engines[0].model, (p * (p / y).log()).mean(), 0.4)
    assert (task.rate(6), task.rate(7)) == (pytest.approx(0.4), pytest.approx(0.04))


def test_labels_begin_as_given_and_phases_fill_the_run(digits: Path) -> None:
    method = build(digits, "pencil", *SHORT)
    assert [(phase.name, phase.num_epochs) for phase in method.phases()] == [
        *(("backbone", 2), ("labels", 3), ("finetune", 3)),
    ]
    expected = 10 * np.eye(10)[method.context.labels]
    np.testing.assert_array_equal(method.variables.rows, expected)
    verdicts = method.verdicts()
    np.testing.assert_array_equal(verdicts.suggested, method.context.labels)
    np.testing.assert_allclose(verdicts.clean_probability, np.e**10 / (np.e**10 + 9), rtol=1e-5)


def labels_of_two_epochs(world: World, digits: Path) -> np.ndarray:
    """All label variables after two epochs of a network that stays what it is."""
    settings = ("optim.lr=1e-30", "optim.weight_decay=0", "optim.lr_rule=none", "method.pencil.label_lr=2000")
    method = build(digits, "pencil", *SHORT, *settings, world=world)
    (engine,) = method.engines
    engine.model.eval()
    engine.model.train = lambda mode=True: engine.model
    for epoch in (2, 3):
        run_pass(method.context, task_of(method, epoch, "net0"))
    variables: np.ndarray = method.variables.gather()
    return variables


def test_labels_learn_the_same_on_any_number_of_ranks_and_in_any_batch(digits: Path) -> None:
    (alone,) = run_ranks(labels_of_two_epochs, 1, digits)
    assert (np.abs(alone - 10 * np.eye(10)[alone.argmax(1)]).max(1) > 0.01).all(), "every row has learnt"
    for size in (2, 3):
        for variables in run_ranks(labels_of_two_epochs, size, digits):
            np.testing.assert_allclose(variables, alone, rtol=1e-4, atol=1e-4)
