import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from nldist.config.file import load_config
from nldist.data.stream import Batch
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.estimate import division
from nldist.estimate.mixture import Mixture
from nldist.methods import mixnn
from nldist.methods.mixnn import MixNN, NeighbourhoodPass, mixing_weights, nearest_in_batch
from nldist.models import build_model
from nldist.passes.supervised import Step
from nldist.train.dry_run import dry_run
from nldist.train.run_pass import run_pass
from tests.conftest import REPOSITORY
from tests.contexts import open_context, task_of
from tests.jobs import DIGITS, output, run_job
from tests.ranks import run_ranks
from tests.tables import assert_same_tables, independent_of_the_batch, softmax
from tests.test_train import assert_same_weights

N = 1437
# es = 4, the first epoch of synthetic samples is 5 (counted from 1), soft labels move in 4, 6, 8.
SETTINGS = (
    *("method.name=mixnn", "train.epochs=8", "method.mixnn.warmup_epochs=2", "method.mixnn.turning_epoch=4"),
    "method.mixnn.update_every=2",
)
DATA_SET = ("method.mixnn.neighbours=data_set", "method.mixnn.k=4")


def build(digits: Path, *overrides: str, world: World | None = None) -> MixNN:
    return MixNN(open_context(load_config(DIGITS, (f"data.root={digits}", *SETTINGS, *overrides)), world))


def names(method: MixNN, epoch: int) -> list[str]:
    """The passes of an epoch."""
    first = 0
    for phase in method.phases():
        if epoch < first + phase.num_epochs:
            return [task.name for task in phase.passes(epoch)]
        first += phase.num_epochs
    raise LookupError(f"{epoch} is past the last epoch")


# Weights and neighbours


def test_weights_are_the_shares_of_the_clean_probabilities() -> None:
    """a_k = w_k / sum w; K = 2: (w + 1e-10) / (w + w_nn + 1e-10), 1 where both are 0 (our own reference)."""
    w = np.array([[0.5, 0.25], [1, 0], [0, 1], [0, 0], [1, 1], [1e-12, 1e-12]])
    found = mixing_weights(torch.from_numpy(w)).numpy()
    own = (w[:, 0] + 1e-10) / (w[:, 0] + w[:, 1] + 1e-10)
    np.testing.assert_allclose(found, np.stack([own, w[:, 1] / (w.sum(1) + 1e-10)], 1), rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert found[3].tolist() == [1, 0], "it stays itself"
    single = mixing_weights(torch.from_numpy(w).float()).numpy()
    assert single[3].tolist() == [1, 0]
    np.testing.assert_allclose(single[:5], found[:5], rtol=1e-6)
    many = np.random.default_rng(0).random((7, 5))
    np.testing.assert_allclose(mixing_weights(torch.from_numpy(many)), many / many.sum(1, keepdims=True), rtol=1e-8)
    assert (mixing_weights(torch.from_numpy(many[:, :1])) == 1).all(), "K = 1 is nobody but itself"


@pytest.mark.parametrize(("b", "k"), [(1, 2), (2, 2), (3, 8), (40, 2), (40, 5), (40, 1)])
def test_neighbours_in_the_batch_are_the_nearest_others(b: int, k: int) -> None:
    """Also where the batch has fewer than K samples; of copies the first (our own reference)."""
    rng = np.random.default_rng(b * k)
    features = rng.normal(size=(b, 6))
    features[b // 2] = features[0]
    found = nearest_in_batch(torch.from_numpy(features), k)
    assert found.shape == (b, min(k, b))
    for i, row in enumerate(found.tolist()):
        distances = [(np.linalg.norm(features[i] - features[j]), j) for j in range(b) if j != i]
        assert row == [i, *(j for _, j in sorted(distances)[: k - 1])]


# One step


class Spy:
    """An engine that keeps what its network was given last and what it gave."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def forward(self, *calls: Any) -> list[Tensor]:
        self.images = calls[0][0].detach().numpy().astype(float)
        outputs: list[Tensor] = self.engine.forward(*calls)
        self.logits = outputs[0].detach().numpy().astype(float)
        return outputs

    def predict(self, *arguments: Any, **options: Any) -> list[Tensor]:
        outputs: list[Tensor] = self.engine.predict(*arguments, **options)
        return outputs


def a_step(method: MixNN, epoch: float, size: int = 24) -> Step:
    rng = np.random.default_rng(1)
    ids = rng.choice(N, size, replace=False)
    labels = torch.from_numpy(method.context.labels[ids]).long()
    images = torch.from_numpy(rng.normal(size=(size, 3, 8, 8)).astype(np.float32))
    return Step(torch.from_numpy(ids), labels, images, epoch, np.random.default_rng(2))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(softmax(logits)))


@pytest.mark.parametrize("loss", ["linear", "cross_entropy"])
def test_mixup_before_es_has_the_released_code_s_linear_loss_or_cross_entropy(loss: str, digits: Path) -> None:
    """lambda l(y_a) + (1 - lambda) l(y_b), l = -p or -log p (our own reference)."""
    method = build(digits, f"method.mixnn.mixup_loss={loss}")
    method.engines[0].start_pass(1, 0)
    spy, step = Spy(method.engines[0]), a_step(method, 2.0)
    value = method.mixup_loss(spy, step)["loss"].item()  # type: ignore[arg-type]
    random = np.random.default_rng(2)
    weight, partner = random.uniform(), random.permutation(24)
    x, y = step.images.numpy(), step.labels.numpy()
    np.testing.assert_allclose(spy.images, weight * x + (1 - weight) * x[partner], atol=1e-5)
    scores = softmax(spy.logits) if loss == "linear" else log_softmax(spy.logits)
    rows = np.arange(24)
    expected = -(weight * scores[rows, y] + (1 - weight) * scores[rows, y[partner]]).mean()
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("epoch", "due"), [(3.9, True), (4.5, False)])
def test_at_es_mixup_learns_soft_labels(epoch: float, due: bool, digits: Path) -> None:
    method = build(digits)
    rng = np.random.default_rng(3)
    soft = rng.dirichlet(np.ones(10), N)
    method.soft.rows.copy_(torch.from_numpy(soft))
    method.engines[0].start_pass(1, 0)
    before = train_mode_outputs(method, a_step(method, epoch).images)
    spy, step = Spy(method.engines[0]), a_step(method, epoch)
    value = method.turning_loss(spy, step)["loss"].item()  # type: ignore[arg-type]
    s = soft[step.ids.numpy()]
    if due:
        s = 0.9 * s + 0.1 * softmax(before["classify"])
    np.testing.assert_allclose(method.soft[step.ids].numpy(), s, atol=1e-5)
    random = np.random.default_rng(2)
    weight, partner = random.uniform(), random.permutation(24)
    targets = weight * s + (1 - weight) * s[partner]
    assert value == pytest.approx(float(-(targets * log_softmax(spy.logits)).sum(1).mean()), rel=1e-4)


def train_mode_outputs(method: MixNN, images: Tensor) -> dict[str, np.ndarray]:
    """Features and logits by a copy of the network, with the batch's own statistics."""
    copy = build_model("small_cnn", 10)
    copy.load_state_dict(method.engines[0].model.state_dict())
    with torch.no_grad():
        outputs = functional_call(copy.train(), {}, ((images, "features", "classify"),))
    return {name: value.numpy() for name, value in zip(("features", "classify"), outputs, strict=True)}


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(("epoch", "due"), [(4.0, False), (5.99, True)])
@pytest.mark.parametrize("size", [24, 3])  # 3: fewer than K and than C
def test_a_step_of_synthetic_samples(k: int, epoch: float, due: bool, size: int, digits: Path) -> None:
    """x~ = sum a_k x_k, L = mean of sum a_k CE(p(x~), s_k), s moved before by the un-mixed prediction (our own)."""
    method = build(digits, f"method.mixnn.k={k}")
    rng = np.random.default_rng(4)
    soft, w = rng.dirichlet(np.ones(10), N), rng.random(N)
    step = a_step(method, epoch, size)
    ids, x = step.ids.numpy(), step.images.numpy().astype(float)
    w[ids[:2]] = 0, 1
    w[np.setdiff1d(np.arange(N), ids)] = np.nan  # must not be read
    method.soft.rows.copy_(torch.from_numpy(soft))
    method.clean.rows.copy_(torch.from_numpy(w))
    method.engines[0].start_pass(1, 0)
    before = train_mode_outputs(method, step.images)
    spy = Spy(method.engines[0])
    values = method.synthetic_loss(spy, step)  # type: ignore[arg-type]
    s = soft[ids]
    if due:
        s = 0.9 * s + 0.1 * softmax(before["classify"])
    np.testing.assert_allclose(method.soft[step.ids].numpy(), s, atol=1e-5)
    log_p, losses, shares = log_softmax(spy.logits), [], []
    for i in range(size):
        order = np.argsort(np.linalg.norm(before["features"] - before["features"][i], axis=1), kind="stable")
        members = [i, *[j for j in order if j != i][: k - 1]]
        a = w[ids[members]] / w[ids[members]].sum()
        np.testing.assert_allclose(spy.images[i], np.einsum("k,k...->...", a, x[members]), atol=1e-5)
        losses.append(-sum(a[m] * (s[j] * log_p[i]).sum() for m, j in enumerate(members)))
        shares.append(a[0])
    assert values["loss"].item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(values["own_weight"]) == pytest.approx(np.mean(shares), rel=1e-4)


def test_with_no_clean_sample_around_each_stays_itself(digits: Path) -> None:
    method = build(digits)
    method.clean.rows.zero_()
    method.engines[0].start_pass(1, 0)
    spy, step = Spy(method.engines[0]), a_step(method, 4.0)
    values = method.synthetic_loss(spy, step)  # type: ignore[arg-type]
    np.testing.assert_array_equal(spy.images, step.images.numpy())
    assert float(values["own_weight"]) == 1


# Epochs


def test_what_an_epoch_consists_of(digits: Path) -> None:
    method = build(digits)
    assert [(phase.name, phase.num_epochs) for phase in method.phases()] == [
        ("warmup", 2),
        ("mixup", 2),
        ("synthetic", 4),
    ]
    assert [names(method, epoch) for epoch in (0, 2, 3, 4)] == [["net0"]] * 3 + [["sweep", "net0"]]
    assert [method.is_due(epoch) for epoch in range(8)] == [False, True] * 4
    averaging = build(digits, "method.mixture.history=2")
    assert names(averaging, 2) == ["net0"], "the mixture of epoch 5 averages over epochs 4 and 5"
    assert names(averaging, 3) == ["sweep", "net0"]
    searching = build(digits, *DATA_SET, "method.mixnn.refresh_epochs=3")
    assert [names(searching, epoch) for epoch in (4, 5, 7)] == [
        ["sweep", "search", "net0"],
        ["sweep", "net0"],
        ["sweep", "search", "net0"],
    ]


def test_the_weights_are_the_mixture_s_over_the_losses_of_the_corrected_labels(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build(digits)
    context = method.context
    rng = np.random.default_rng(5)
    soft = rng.dirichlet(np.ones(10), N)
    method.soft.rows.copy_(torch.from_numpy(soft))
    fitted: list[Mixture | None] = []
    original = division.divide

    def kept(*arguments: Any) -> Any:
        values, mixture = original(*arguments)
        fitted.append(mixture)
        return values, mixture

    monkeypatch.setattr(mixnn, "divide", kept)
    task = task_of(method, 4, "sweep")
    metrics = run_pass(context, task)
    batches = [step["all"] for step in context.stream("train", context.sweep(N))]
    logits = torch.cat([method.logits(context.fixed_view(batch)) for batch in batches]).numpy().astype(float)
    losses = -log_softmax(logits)[np.arange(N), soft.argmax(1)]
    scaled = (losses - losses.min()) / (losses.max() - losses.min())
    (mixture,) = fitted
    assert mixture is not None
    w = mixture.clean_probability(scaled)
    np.testing.assert_allclose(method.clean.rows.numpy(), w, atol=1e-3)
    verdicts = method.verdicts()
    assert verdicts is not None
    given, corrected = context.labels, soft.argmax(1)
    expected = np.where(corrected == given, w, (1 - w) * soft[np.arange(N), given])
    np.testing.assert_allclose(verdicts.clean_probability, expected, atol=1e-3)
    np.testing.assert_array_equal(verdicts.suggested, corrected)
    assert metrics["labelled_share"] == pytest.approx((expected > 0.5).mean(), abs=2e-3)
    assert task.splits()["net"].labels.tolist() == corrected.tolist()


def an_epoch(world: World, digits: Path, *overrides: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Soft labels and weights after a due epoch of a network whose outputs do not depend on the batch."""
    settings = ("optim.lr=1e-12", "train.batch_size=32", "method.mixture.history=3", *overrides)
    method = build(digits, *settings, world=world)
    independent_of_the_batch(method)
    metrics: dict[str, Any] = {}
    for name in names(method, 7) if not method.searches else ("sweep", "search", "net0"):
        metrics |= run_pass(method.context, task_of(method, 4 if name == "search" else 7, name))
    return method.soft.gather(), method.clean.gather(), metrics


@pytest.mark.parametrize("overrides", [(), DATA_SET], ids=["in_batch", "data_set"])
def test_every_row_moves_exactly_once_in_a_due_epoch_on_any_number_of_ranks(
    overrides: tuple[str, ...], digits: Path
) -> None:
    ((soft, clean, metrics),) = run_ranks(an_epoch, 1, digits, *overrides)
    context = build(digits).context
    given = np.eye(10)[context.labels]
    prediction = (soft - 0.9 * given) / 0.1
    assert prediction.min() > -1e-5, "twice would leave less than 0.9 of the given label"
    np.testing.assert_allclose(prediction.sum(1), 1, atol=1e-4)
    assert (prediction[given == 1] < 0.99).all(), "none is as it was"
    assert context.clean is not None
    assert metrics["soft_accuracy"] == pytest.approx(100 * (soft.argmax(1) == context.clean).mean())
    for size in (2, 3):
        for other, weights, found in run_ranks(an_epoch, size, digits, *overrides):
            np.testing.assert_allclose(other, soft, atol=1e-6)
            np.testing.assert_allclose(weights, clean, atol=1e-4)
            assert found["soft_accuracy"] == metrics["soft_accuracy"]


def test_soft_labels_stay_in_an_epoch_that_is_not_due(digits: Path) -> None:
    method = build(digits)
    run_pass(method.context, task_of(method, 4, "net0"))
    np.testing.assert_array_equal(method.soft.rows.numpy(), np.eye(10)[method.context.labels])


# Neighbours from the whole data set


def searched(world: World, digits: Path, *overrides: str) -> tuple[np.ndarray, np.ndarray | None]:
    method = build(digits, *DATA_SET, *overrides, world=world)
    task = task_of(method, 4, "search")
    assert task.resume_step(7) == 0
    run_pass(method.context, task)
    return method.neighbours.gather(), method.population


@pytest.mark.parametrize("subset", ["null", "300"])
def test_the_search_finds_the_nearest_of_the_whole_data_set_on_any_number_of_ranks(subset: str, digits: Path) -> None:
    method = build(digits, *DATA_SET)
    context = method.context
    batches = [step["all"] for step in context.stream("train", context.sweep(N))]
    features = torch.cat([method._features(context.fixed_view(batch)) for batch in batches]).numpy().astype(float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    ((alone, population),) = run_ranks(searched, 1, digits, f"method.mixnn.subset={subset}")
    ids = np.arange(N) if population is None else population
    scores = features[ids] @ features[ids].T
    np.fill_diagonal(scores, -np.inf)
    best = -np.sort(-scores, axis=1)[:, :3]
    places = np.searchsorted(ids, alone[ids])
    np.testing.assert_array_equal(ids[places], alone[ids], err_msg="neighbours are of the subset")
    np.testing.assert_allclose(np.take_along_axis(scores, places, 1), best, atol=1e-5)
    assert all(i not in row for i, row in zip(ids, alone[ids], strict=True))
    assert (np.delete(alone, ids, axis=0) == -1).all()
    for size in (2, 3):
        for other, _ in run_ranks(searched, size, digits, f"method.mixnn.subset={subset}"):
            assert (other == alone).mean() > 0.999, "but for what the network's batches round"


def one_step(world: World, digits: Path, missing: int) -> dict[str, Any]:
    """What one step of a rank is made of, with some of the neighbours' images unreadable."""
    method = build(digits, *DATA_SET, "train.batch_size=16", world=world)
    context = method.context
    rng = np.random.default_rng(6)
    rows, w, soft = rng.integers(N, size=(N, 3)), rng.random(N), rng.dirichlet(np.ones(10), N)
    mine = np.arange(N)[context.table.owned.start : context.table.owned.stop]
    for column, values in ((method.neighbours, rows), (method.clean, w), (method.soft, soft)):
        column.rows.copy_(torch.from_numpy(values[mine]))
    task = task_of(method, 4, "net0")
    assert isinstance(task, NeighbourhoodPass)
    plan = task.plan()
    task.start(plan.num_steps, 0)
    batches = next(iter(context.stream("train", plan)))
    anchors, others = batches["anchors"], batches["neighbours"]
    left = Batch(*(value[missing:] for value in vars(others).values()))
    with pytest.MonkeyPatch.context() as patch:
        original, kept = mixnn.synthetic, []

        def spying(engine: Any, *given: Tensor) -> dict[str, Tensor]:
            kept.append(given)
            return original(engine, *given)

        patch.setattr(mixnn, "synthetic", spying)
        made = task.step({"anchors": anchors, "neighbours": left}, 0)
    ((images, labels, members, clean),) = kept
    every = [context.view(batch, 4, f"net0/{role}") for role, batch in batches.items()]
    return {
        **{"images": images, "soft": labels, "members": members, "clean": clean, "loss": float(made["loss"])},
        **{"anchors": anchors.ids, "own": every[0], "others": every[1], "rows": rows, "w": w, "all_soft": soft},
    }


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("missing", [0, 4, 48])
def test_an_anchor_is_mixed_with_its_neighbours_from_any_rank(size: int, missing: int, digits: Path) -> None:
    """Images, soft labels and weights of each; an image that could not be read has no weight (our own reference)."""
    for found in run_ranks(one_step, size, digits, missing):
        assert np.isfinite(found["loss"])
        num = 0
        for i, anchor in enumerate(found["anchors"].tolist()):
            members, clean = found["members"][i].tolist(), found["clean"][i].numpy()
            assert members[0] == i
            torch.testing.assert_close(found["images"][i], found["own"][i])
            np.testing.assert_allclose(clean[0], found["w"][anchor], rtol=1e-6)
            for slot, neighbour in enumerate(found["rows"][anchor]):
                if num < missing:
                    assert clean[slot + 1] == 0
                else:
                    np.testing.assert_allclose(clean[slot + 1], found["w"][neighbour], rtol=1e-6)
                    torch.testing.assert_close(found["images"][members[slot + 1]], found["others"][num])
                    row = found["soft"][members[slot + 1]]
                    np.testing.assert_allclose(row, found["all_soft"][neighbour], atol=1e-6)
                num += 1


# Whole runs


def test_what_cannot_be_is_refused(digits: Path) -> None:
    with pytest.raises(UserError, match=r"method.mixnn.turning_epoch=8 leaves none of train.epochs=8"):
        build(digits, "method.mixnn.turning_epoch=8")
    with pytest.raises(UserError, match=r"method.mixnn.warmup_epochs=5 is more than turning_epoch=4"):
        build(digits, "method.mixnn.warmup_epochs=5")
    with pytest.raises(UserError, match=r"method.mixnn.subset=7 is too small: set 10 or more"):
        build(digits, "method.mixnn.subset=7")


def test_a_dry_run_tells_of_images_and_state(digits: Path) -> None:
    config = load_config(DIGITS, (f"data.root={digits}", *SETTINGS, *DATA_SET, "method.mixture.history=5"))
    lines = "\n".join(dry_run(config, 2))
    assert "64 anchors + 192 neighbours images per rank" in lines
    # Soft label 40, weight 4, loss 4, predicted and suggested class 2 each, five losses 20, three neighbours 12.
    assert "state       84 bytes per sample" in lines
    assert "activations of 64 images" in lines


@pytest.mark.parametrize(
    ("world_size", "step", "overrides"),
    [
        pytest.param(2, 110, ("method.mixture.history=3",), marks=pytest.mark.slow),
        (3, 73, (*DATA_SET, "method.mixnn.refresh_epochs=2", "method.soft_dtype=float16")),
    ],
    ids=["in_batch", "data_set"],
)
def test_killed_and_resumed_it_ends_the_same_and_better_than_the_labels(
    world_size: int, step: int, overrides: tuple[str, ...], digits: Path, tmp_path: Path
) -> None:
    """Within the first epoch of synthetic samples, in which soft labels move."""
    arguments = [f"data.root={digits}", *SETTINGS, "method.mixnn.update_every=1", "method.mixnn.momentum=0.7"]
    arguments += ["train.checkpoint_every_steps=5", "train.batch_size=32", "optim.restart_epochs=2", *overrides]
    assert run_job(tmp_path / "whole", *arguments, world_size=world_size) == [0] * world_size
    assert run_job(tmp_path / "cut", *arguments, world_size=world_size, kill=(world_size - 1, step))[-1] == -9
    assert run_job(tmp_path / "cut", *arguments, world_size=world_size) == [0] * world_size
    assert re.search(r"resumed from e0004-p0[12]-s0000000[01][1-9]", output(tmp_path / "cut"))
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    assert_same_tables(tmp_path / "whole", tmp_path / "cut")
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert summary["accuracy"]["final"] > 85
    assert summary["split"]["auc"] > 0.85
    context = build(digits).context
    samples = pq.read_table(tmp_path / "cut" / "tables" / "samples.parquet")
    assert (samples["suggested"].to_numpy() == context.clean).mean() > (context.labels == context.clean).mean() + 0.25


def test_it_trains_on_deepspeed(few_digits: Path, tmp_path: Path) -> None:
    arguments = [f"data.root={few_digits}", *SETTINGS, *DATA_SET, "train.epochs=5", "engine.name=deepspeed"]
    assert run_job(tmp_path / "run", *arguments, "engine.zero_stage=1", world_size=2) == [0, 0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy"]["best"] > 30


@pytest.mark.parametrize(
    ("run", "warmup", "history"),
    [
        ("cifar10/mixnn", 9, 1),
        ("cifar10/mixnn-sym80", 9, 5),
        ("cifar100/mixnn", 29, 1),
        ("cifar100/mixnn-sym80", 29, 5),
    ],
)
def test_the_released_code_s_values(run: str, warmup: int, history: int) -> None:
    """Its scripts warm up while epoch < 10 (30 on CIFAR-100), from epoch 1 on."""
    config = load_config(REPOSITORY / "configs" / f"{run}.yaml")
    settings, optim = config.method.mixnn, config.optim
    assert (settings.warmup_epochs, config.method.mixture.history) == (warmup, history)
    assert (settings.turning_epoch, settings.momentum, settings.update_every, settings.k) == (60, 0.9, 10, 2)
    assert (settings.neighbours, settings.mixup_loss, settings.subset) == ("in_batch", "linear", None)
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.min_lr) == (0.02, 0.9, 1e-3, 1e-3)
    assert (optim.schedule, optim.restart_epochs) == ("cosine", 10)
    assert (config.train.epochs, config.train.batch_size, config.model.name) == (300, 128, "resnet34_cifar")


@pytest.mark.parametrize("run", ["animal10n/mixnn", "clothing1m/mixnn", "webvision/mini-mixnn"])
def test_in_a_reconstruction_a_wrong_label_can_change_well_before_the_end(run: str) -> None:
    """Against constant predictions it does when m^n < 1/2 after n updates."""
    config = load_config(REPOSITORY / "configs" / f"{run}.yaml")
    settings = config.method.mixnn
    due = [e for e in range(settings.turning_epoch, config.train.epochs + 1) if e % settings.update_every == 0]
    changes = next(e for n, e in enumerate(due, start=1) if settings.momentum**n < 0.5)
    assert changes <= 0.75 * config.train.epochs
