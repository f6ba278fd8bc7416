import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from nldist.config import LendMethod
from nldist.config.file import load_config
from nldist.data.index import Index
from nldist.dist.engine import Engine
from nldist.dist.world import World
from nldist.methods.lend import Lend, affinity, normalised, spread
from nldist.models import build
from nldist.passes.supervised import Step
from nldist.train.dry_run import dry_run
from nldist.train.run_pass import run_pass
from tests.contexts import open_context, task_of
from tests.jobs import DIGITS, run_job
from tests.networks import Flat
from tests.ranks import run_ranks
from tests.test_train import assert_same_weights, epoch_records

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


# Several ranks


def spread_part(world: World, digits: Path, profile: str, bounds: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    method = build_lend(digits, f"method.lend.profile={profile}", "method.lend.graph=all_ranks", world=world)
    features, labels = (rows.float()[bounds[world.rank] : bounds[world.rank + 1]] for rows in clusters(61, 7))
    diluted, isolated = method.spread(features, labels)
    return diluted.numpy(), isolated.numpy()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_gathered_graph_is_the_concatenated_batch_s_to_the_bit(profile: str, digits: Path) -> None:
    ((diluted, isolated),) = run_ranks(spread_part, 1, digits, profile, (0, 61))
    for bounds in ((0, 40, 61), (0, 30, 31, 61)):
        parts = run_ranks(spread_part, len(bounds) - 1, digits, profile, bounds)
        assert np.array_equal(np.concatenate([rows for rows, _ in parts]), diluted)
        assert np.array_equal(np.concatenate([rows for _, rows in parts]), isolated)
    features, labels = clusters(61, 7)
    own, _ = spread(features[:40].float(), labels[:40].float(), settings_of(profile, k=3))
    assert not np.allclose(own, diluted[:40]), "a rank's own graph is another one"


class Linear(Flat):
    """Features without batch norm, whose statistics are each rank's own; in float64."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, self.num_features))

    def forward_features(self, images: Tensor) -> Tensor:
        return super().forward_features(images.double())


class PreciseLend(Lend):
    def build_engines(self) -> list[Engine]:
        return [self.context.engine(0, nn.Module.double)]


def one_epoch(world: World, digits: Path, profile: str) -> np.ndarray:
    """All diluted labels after an epoch that is one step over all samples."""
    build.OWN_BACKBONES["linear"] = Linear  # type: ignore[assignment]
    settings = ("model.name=linear", f"train.batch_size={-(-1437 // world.size)}", "method.lend.graph=all_ranks")
    method = build_lend(digits, *settings, f"method.lend.profile={profile}", world=world, method=PreciseLend)
    run_pass(method.context, task_of(method, 0, "net0"))
    return method.diluted.gather()


@pytest.mark.parametrize("profile", PROFILES)
def test_the_tables_are_the_same_on_any_number_of_ranks(profile: str, digits: Path) -> None:
    (alone,) = run_ranks(one_epoch, 1, digits, profile)
    assert len(np.unique(alone.argmax(1))) == 10
    for size in (2, 3):
        for diluted in run_ranks(one_epoch, size, digits, profile):
            np.testing.assert_allclose(diluted, alone, rtol=0, atol=1e-5)


def two_epochs_towards_uniform(world: World, digits: Path) -> tuple[np.ndarray, np.ndarray]:
    """All diluted labels where each dilution gives the uniform distribution; and the given labels."""
    method = build_lend(digits, "method.lend.profile=paper", "train.batch_size=100", world=world)
    method.spread = lambda features, labels: (torch.full_like(labels, 0.1), labels[:, 0] < 0)  # type: ignore[method-assign]
    for epoch in (0, 1):
        run_pass(method.context, task_of(method, epoch, "net0"))
    return method.diluted.gather(), method.context.labels


def test_every_row_is_updated_exactly_once_per_epoch(digits: Path) -> None:
    for size in (1, 2, 3):
        for diluted, labels in run_ranks(two_epochs_towards_uniform, size, digits):
            np.testing.assert_allclose(diluted, 0.81 * np.eye(10)[labels] + 0.19 * 0.1, rtol=1e-6)


# Whole runs


def tables(run_dir: Path) -> dict[str, bytes]:
    newest = max((run_dir / "checkpoints").iterdir())
    return {file.name: file.read_bytes() for file in newest.rglob("*.npy")}


@pytest.mark.parametrize(
    ("size", "profile", "kills"),
    [(2, "code", ((1, 17), (0, 9))), (3, "paper", ((2, 13),))],
)
def test_killed_within_an_epoch_and_resumed_it_ends_the_same(
    size: int, profile: str, kills: tuple[tuple[int, int], ...], digits: Path, tmp_path: Path
) -> None:
    arguments = [f"data.root={digits}", "method.name=lend", "train.epochs=3", "train.checkpoint_every_steps=4"]
    arguments += [f"method.lend.profile={profile}", "method.lend.history_from=1", "method.soft_dtype=float16"]
    arguments += ["method.lend.graph=all_ranks"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_job(whole, *arguments, world_size=size) == [0] * size
    for kill in kills:
        assert run_job(cut, *arguments, world_size=size, kill=kill)[kill[0]] == -9
    assert run_job(cut, *arguments, world_size=size) == [0] * size
    assert_same_weights(whole, cut)
    assert epoch_records(whole) == epoch_records(cut)
    assert len(tables(whole)) == 2 * size
    assert tables(whole) == tables(cut)
    assert pq.read_table(whole / "tables/samples.parquet") == pq.read_table(cut / "tables/samples.parquet")


def test_it_learns_from_labels_of_which_half_were_drawn_at_random(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_job(run_dir, f"data.root={digits}", "method.name=lend", "train.epochs=12") == [0]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["accuracy"]["final"] > 88
    assert summary["split"]["auc"] > 0.9
    truth, given = (Index.open(digits, "train").labels(name) for name in ("clean", "sym50"))
    table = pq.read_table(run_dir / "tables" / "samples.parquet").to_pydict()
    right = (np.array(table["suggested"]) == truth).mean()
    assert right > 0.75 > (given == truth).mean()
    assert epoch_records(run_dir)[-1]["diluted_accuracy"] == pytest.approx(100 * right)


def test_deepspeed_trains_it(digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={digits}", "method.name=lend", "train.epochs=1", "method.lend.graph=all_ranks")
    assert run_job(tmp_path / "ddp", *arguments, world_size=2) == [0, 0]
    zero = ("engine.name=deepspeed", "engine.zero_stage=1")
    assert run_job(tmp_path / "zero", *arguments, *zero, world_size=2) == [0, 0]
    (one,), (other,) = (epoch_records(tmp_path / name) for name in ("ddp", "zero"))
    assert other["net0/loss"] == pytest.approx(one["net0/loss"], rel=0.02)
    assert other["labelled_share"] == pytest.approx(one["labelled_share"], abs=0.02)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 41), ("float16", 21)])
def test_a_dry_run_says_what_it_keeps(dtype: str, size: int, digits: Path) -> None:
    settings = [f"data.root={digits}", "method.name=lend", f"method.soft_dtype={dtype}"]
    report = "\n".join(dry_run(load_config(DIGITS, settings), 2))
    assert f"state       {size} bytes per sample" in report
    assert "net0: 12 steps of 64 all images per rank" in report
