from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nldist.config import LendMethod
from nldist.config.file import load_config
from nldist.dist.world import World
from nldist.methods.lend import Lend, affinity, normalised, spread
from nldist.passes.supervised import Step
from tests.contexts import open_context, task_of
from tests.jobs import DIGITS

PROFILES = ("code", "paper")
FORMS = (None, "closed", "zhou", "lazy")


def build_lend(digits: Path, *overrides: str, world: World | None = None, method: type[Lend] = Lend) -> Lend:
    settings = (f"data.root={digits}", "method.name=lend", "train.epochs=20", *overrides)
    return method(open_context(load_config(DIGITS, settings), world))


def clusters(num_rows: int, num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around a centre for each class, negative ones among them; labels of which a third are wrong."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(num_classes, size=num_rows)
    features = rng.normal(size=(num_classes, 12))[truth] + 0.6 * rng.normal(size=(num_rows, 12))
    labels = np.where(rng.random(num_rows) < 1 / 3, rng.integers(num_classes, size=num_rows), truth)
    return torch.from_numpy(features), torch.from_numpy(np.eye(num_classes)[labels])


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def reference_graph(v: np.ndarray, settings: LendMethod) -> tuple[np.ndarray, np.ndarray]:
    """Equations 1 and 2, row by row: W and the isolated rows."""
    n, code = len(v), settings.profile == "code"
    a = np.zeros((n, n))
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: ((v[i] - v[j]) ** 2).sum())
        for j in others[: settings.k - 1 if code else settings.k]:
            a[i, j] = max(v[i] @ v[j], 0) ** settings.gamma
    w = a @ a.T if code else a.T @ a
    degrees = w.sum(1)
    for i in range(n):
        for j in range(n):
            w[i, j] = w[i, j] / np.sqrt(degrees[i] * degrees[j]) if degrees[i] * degrees[j] else 0
    return w, degrees == 0


def reference(v: np.ndarray, q: np.ndarray, settings: LendMethod) -> np.ndarray:
    """Equation 3 in each of its forms (our own reference)."""
    w, isolated = reference_graph(v, settings)
    form = settings.dilution or {"code": "closed", "paper": "lazy"}[settings.profile]
    z, alpha = q, settings.alpha
    if form == "closed":
        z = softmax(np.linalg.inv(np.eye(len(v)) - alpha * w) @ q)
    else:
        for _ in range(settings.steps):
            z = alpha * w @ z + (1 - alpha) * {"zhou": q, "lazy": z}[form]
        z = z / np.where(isolated, 1, z.sum(1))[:, None]
    return np.where(isolated[:, None], q, z)


def settings_of(profile: str, form: str | None = None, **values: Any) -> LendMethod:
    return LendMethod.model_validate({"profile": profile, "dilution": form, "k": 5} | values)


def check(features: Tensor, labels: Tensor, settings: LendMethod) -> Tensor:
    diluted, isolated = spread(features, labels, settings)
    np.testing.assert_allclose(diluted, reference(features.numpy(), labels.numpy(), settings), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(diluted.sum(1), 1, rtol=1e-9)
    assert isolated.tolist() == reference_graph(features.numpy(), settings)[1].tolist()
    return diluted


# The equations


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("profile", PROFILES)
def test_dilution_against_the_equations(profile: str, form: str | None) -> None:
    features, labels = clusters(40, 4)
    for values in ({}, {"k": 3, "gamma": 1.0, "alpha": 0.5, "steps": 7}):
        check(features, labels, settings_of(profile, form, **values))


def test_the_two_profiles_graphs_differ_and_no_eigenvalue_is_above_one() -> None:
    edges = affinity(clusters(40, 4)[0], 4, 3.0)
    one, _ = normalised(edges @ edges.T)
    other, _ = normalised(edges.T @ edges)
    assert not torch.allclose(one, other)
    for graph in (one, other):
        eigenvalues = torch.linalg.eigvalsh(graph)
        assert -1e-12 < eigenvalues.min() <= eigenvalues.max() < 1 + 1e-12


def test_zhou_s_iteration_ends_at_the_closed_form_before_its_softmax() -> None:
    features, labels = clusters(40, 4)
    settings = settings_of("code", "zhou", alpha=0.9, steps=400)
    graph, _ = reference_graph(features.numpy(), settings)
    closed = np.linalg.inv(np.eye(40) - 0.9 * graph) @ labels.numpy()
    np.testing.assert_allclose(spread(features, labels, settings)[0], closed / closed.sum(1, keepdims=True))


def test_wrong_labels_are_overwhelmed_by_their_neighbours() -> None:
    """What the paper is about: on separate clusters a fourth of the labels is wrong, and next to none when diluted."""
    rng = np.random.default_rng(0)
    truth = rng.integers(4, size=256)
    features = 4 * np.eye(4)[truth] + 0.1 * rng.normal(size=(256, 4))
    given = np.where(rng.random(256) < 1 / 3, rng.integers(4, size=256), truth)
    for profile in PROFILES:
        diluted, _ = spread(torch.from_numpy(features), torch.eye(4).double()[given], settings_of(profile, k=8))
        assert (given == truth).mean() < 0.8
        assert (diluted.argmax(1).numpy() == truth).mean() > 0.95


# Limit cases


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("form", FORMS)
def test_an_isolated_row_keeps_its_label_and_the_others_are_diluted(form: str | None, profile: str) -> None:
    features, labels = clusters(40, 4)
    features[:, 0] = features[:, 0].abs() + 1
    features[7] = 0
    features[7, 0] = -30  # no positive product with any other row, and far from all
    settings = settings_of(profile, form)
    diluted, isolated = spread(features, labels, settings)
    assert isolated[7]
    assert torch.equal(diluted[7], labels[7])
    assert (diluted != labels).any(1).sum() > 20
    check(features, labels, settings)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_a_batch_of_fewer_rows_than_neighbours(num_rows: int, profile: str) -> None:
    features, labels = clusters(num_rows, 4)
    check(features, labels, settings_of(profile, k=8))
    if num_rows == 1:
        assert torch.equal(spread(features, labels, settings_of(profile))[0], labels), "it has no neighbour at all"


@pytest.mark.parametrize("profile", PROFILES)
def test_more_classes_than_rows(profile: str) -> None:
    diluted = check(*clusters(12, 1000), settings_of(profile))
    assert diluted.shape == (12, 1000)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_one_sample_of_a_class_takes_its_neighbours_label(profile: str) -> None:
    features, labels = clusters(40, 3)
    labels = torch.cat([labels, torch.zeros(40, 1).double()], 1)
    labels[5] = torch.eye(4)[3]
    diluted = check(features, labels, settings_of(profile))
    assert diluted[5].argmax() != 3


@pytest.mark.parametrize("profile", PROFILES)
def test_features_without_length_leave_all_labels_as_they_are(profile: str) -> None:
    features, labels = clusters(10, 3)
    diluted, isolated = spread(0 * features, labels, settings_of(profile))
    assert isolated.all()
    assert torch.equal(diluted, labels)


@pytest.mark.parametrize("scale", [1e-6, 1e5])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_scale_of_the_features_cancels_also_in_float32(profile: str, scale: float) -> None:
    """Their sixth power would not fit."""
    features, labels = (rows.float() for rows in clusters(40, 4))
    settings = settings_of(profile)
    diluted, isolated = spread(scale * features, labels, settings)
    assert not isolated.all()
    torch.testing.assert_close(diluted, spread(features, labels, settings)[0], rtol=1e-3, atol=1e-4)


# A step


def first_step(method: Lend, epoch: float) -> Step:
    batch = next(iter(method.context.stream("train", task_of(method, 0, "net0").plan())))["all"]
    view = method.context.fixed_view(batch)
    return Step(batch.ids, batch.labels, view, epoch, np.random.default_rng(0))


def expected_rows(method: Lend, v: np.ndarray, step: Step, before: np.ndarray) -> np.ndarray:
    """The batch's new diluted labels: step 5 of either profile."""
    settings, y = method.settings, np.eye(10)[step.labels]
    if settings.profile == "paper":
        return (1 - settings.beta) * reference(v, y, settings) + settings.beta * before
    if step.epoch >= settings.history_from:
        y = settings.beta * y + (1 - settings.beta) * before
    return reference(v, y, settings)


@pytest.mark.parametrize("epoch", [9.9, 10.0])
@pytest.mark.parametrize("profile", PROFILES)
def test_a_step_against_the_equations(profile: str, epoch: float, digits: Path) -> None:
    method = build_lend(digits, f"method.lend.profile={profile}", "method.lend.beta=0.7", "train.batch_size=48")
    step = first_step(method, epoch)
    rng = np.random.default_rng(1)
    before = rng.dirichlet(np.full(10, 0.3), size=len(step.ids)).astype(np.float32)
    method.diluted[step.ids] = torch.from_numpy(before)
    (engine,) = method.engines
    engine.start_pass(1, 0)
    network = engine.model
    logits, features = network((step.images, "classify", "features"))
    rows = expected_rows(method, features.detach().double().numpy(), step, before)
    labels = step.labels.numpy()
    weight = rows[np.arange(len(rows)), labels] if profile == "code" else rows.argmax(1) == labels
    losses = -logits.log_softmax(1)[torch.arange(len(rows)), step.labels]
    loss = (torch.from_numpy(weight).float() * losses).mean()

    values = method.loss(engine, step)
    assert 0 < weight.mean() < 1
    np.testing.assert_allclose(method.diluted[step.ids], rows, rtol=2e-3, atol=1e-4)
    assert values["loss"].item() == pytest.approx(loss.item(), rel=1e-3)
    assert values["weight"].item() == pytest.approx(weight.mean(), rel=1e-3)
    parameters = list(network.parameters())
    for got, want in zip(*(torch.autograd.grad(x, parameters) for x in (values["loss"], loss)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-4)  # the graph has no gradient


def test_verdicts_are_the_diluted_labels_and_say_nothing_of_what_was_not_seen(digits: Path) -> None:
    method = build_lend(digits, "method.lend.profile=paper", "method.soft_dtype=float16")
    assert np.isnan(method.verdicts().clean_probability).all()
    assert (method.verdicts().suggested == -1).all()
    step = first_step(method, 3.5)
    method.engines[0].start_pass(1, 0)
    method.loss(method.engines[0], step)
    verdicts, ids = method.verdicts(), step.ids.numpy()
    assert np.flatnonzero(verdicts.suggested >= 0).tolist() == sorted(ids)
    rows = method.diluted[step.ids].double().numpy()
    share = rows[np.arange(len(ids)), step.labels] / rows.sum(1)
    np.testing.assert_allclose(verdicts.clean_probability[ids], share, rtol=1e-3)
    assert (verdicts.suggested[ids] == rows.argmax(1)).all()
    assert np.isnan(np.delete(verdicts.clean_probability, ids)).all()
