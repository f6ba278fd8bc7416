from pathlib import Path

import numpy as np
import pytest
import torch

from nldist.dist.table import Column
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.methods.forward import TRANSITION_FILE, estimate_transition, forward_loss
from nldist.train.run_pass import run_pass
from tests.contexts import task_of
from tests.methods.baselines import PLAIN, assert_descended, build, one_step
from tests.ranks import run_ranks

SHORT = ("method.forward.estimate_epochs=2",)


def test_the_loss_against_the_equation() -> None:
    """-log (T^t p)_y in NumPy; a class that no label comes from stays finite."""
    rng = np.random.default_rng(0)
    logits, transition = rng.normal(size=(6, 4)) * 3, rng.dirichlet(np.ones(4), 4)
    transition[1] = np.eye(4)[1]
    labels = np.array([0, 1, 2, 3, 1, 0])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log((p @ transition)[np.arange(6), labels]).mean()
    found = forward_loss(*(torch.from_numpy(x) for x in (logits, labels, transition)))
    assert float(found) == pytest.approx(expected, rel=1e-9)
    impossible = forward_loss(torch.zeros(1, 4), torch.tensor([2]), torch.eye(4)[[0, 1, 0, 3]])
    assert impossible.isfinite()


def reference_transition(noisy: np.ndarray, percentile: float) -> np.ndarray:
    rows = []
    for i in range(noisy.shape[1]):
        p = noisy[:, i].copy()
        if percentile < 100:
            p[p >= np.percentile(p, percentile, method="higher")] = 0
        rows.append(noisy[p.argmax()])
    return np.asarray(np.array(rows) / np.sum(rows, axis=1, keepdims=True))


def estimated(world: World, noisy: np.ndarray, percentile: float) -> np.ndarray:
    owned = slice(world.rank * len(noisy) // world.size, (world.rank + 1) * len(noisy) // world.size)
    return estimate_transition(Column(torch.from_numpy(noisy[owned]), len(noisy), world, 0), percentile, world)


@pytest.mark.parametrize("percentile", [97.0, 100.0])
def test_anchors_are_found_over_all_ranks(percentile: float) -> None:
    noisy = np.random.default_rng(1).dirichlet(np.full(5, 0.3), 301).astype(np.float32)
    expected = reference_transition(noisy.astype(np.float64), percentile)
    for size in (1, 2, 3):
        for found in run_ranks(estimated, size, noisy, percentile):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_matrix_comes_between_the_trainings_and_another_network_begins(digits: Path, tmp_path: Path) -> None:
    method = build(digits, "forward", *SHORT, f"run.dir={tmp_path}")
    assert method.num_epochs == 2 + 8
    assert method.evaluation(1) == []
    assert [task.name for task in method.phases()[1].passes(2)] == ["anchors", "net1"]
    assert [task.name for task in method.phases()[1].passes(3)] == ["net1"]
    for epoch in (0, 1):
        run_pass(method.context, task_of(method, epoch, "net0"))
    task = task_of(method, 2, "anchors")
    metrics = run_pass(method.context, task)
    expected = reference_transition(task.noisy.rows.double().numpy(), 97)
    np.testing.assert_allclose(method.transition, expected, rtol=1e-5)
    np.testing.assert_allclose(np.load(method.context.directory / TRANSITION_FILE), expected, rtol=1e-5)
    assert metrics["transition_diagonal"] == pytest.approx(expected.diagonal().mean())
    again = build(digits, "forward", *SHORT)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.transition, method.transition)
    method.engines[0].model.requires_grad_(False).eval()
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(method.logits(images), method.engines[1].model.eval().logits(images))
    assert len(method.weights()) == 1


def test_the_second_training_has_the_schedule_from_its_beginning(digits: Path) -> None:
    method = build(digits, "forward", *SHORT, "optim.schedule=step", "optim.milestones=[3]")
    rates: list[float] = []
    for epoch in (2, 4, 5):
        task = task_of(method, epoch, "net1")
        rates.append(task.rate(task.epoch))
    assert rates == pytest.approx([0.02, 0.02, 0.002])


def given(path: Path, matrix: np.ndarray) -> str:
    np.save(path, matrix)
    return f"method.forward.transition={path}"


def test_one_step_with_a_given_matrix(digits: Path, tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).dirichlet(np.ones(10), 10)
    method = build(digits, "forward", given(tmp_path / "t.npy", matrix), *PLAIN)
    assert (method.num_epochs, len(method.engines)) == (8, 1)
    done = one_step(method, task_of(method, 0, "net0"))
    p = done.models[0].logits(done.images).softmax(1)
    loss = -(p @ torch.from_numpy(matrix).float()).gather(1, done.labels[:, None]).log().mean()
    torch.testing.assert_close(done.values["loss"], loss.detach())
    assert_descended(done.models[0], method.engines[0].model, loss, 0.02)


def test_what_is_no_transition_matrix_is_refused(digits: Path, tmp_path: Path) -> None:
    for matrix, told in (
        (np.eye(3), "holds a matrix of 3 x 3; the data set's classes need 10 x 10"),
        (np.ones((10, 10)), "is no transition matrix"),
        (2 * np.eye(10) - 0.1, "is no transition matrix"),
    ):
        with pytest.raises(UserError, match=told):
            build(digits, "forward", given(tmp_path / "t.npy", matrix))
    with pytest.raises(UserError, match="cannot be read"):
        build(digits, "forward", f"method.forward.transition={tmp_path / 'none.npy'}")
