from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nldist.config.file import load_config
from nldist.data.stream import Batch, Stream
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.methods.scanmix import ScanMix
from nldist.models import Network, build_model
from nldist.passes.base import Split
from nldist.passes.data import Data
from nldist.pretext.mine import GRAPH_FILE
from nldist.pretext.pairs import whole_pairs
from nldist.pretext.scan import CLUSTER, Scan, ValidationPass
from nldist.train.run_pass import run_pass
from tests.conftest import REPOSITORY
from tests.contexts import open_context, task_of
from tests.ranks import run_ranks

State = dict[str, Tensor]
SETTINGS = ("method.name=scanmix", "train.epochs=6", "train.batch_size=32", "method.dividemix.warmup_epochs=2")


@pytest.fixture(scope="module")
def products(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A graph and weights as the stages before leave them: random ones."""
    root = tmp_path_factory.mktemp("products")
    rng = np.random.default_rng(0)
    graph = np.stack([rng.choice(np.delete(np.arange(1437), i), 10, replace=False) for i in range(1437)])
    for stage in ("mine", "cluster", "pretext"):
        (root / stage / "tables").mkdir(parents=True)
        (root / stage / "weights").mkdir()
    np.save(root / "mine" / "tables" / GRAPH_FILE, graph.astype(np.int32))
    torch.manual_seed(5)
    state = build_model("small_cnn", 10).state_dict()
    torch.save({"networks": [state]}, root / "cluster" / "weights" / "best.pt")
    torch.save({"networks": [state]}, root / "pretext" / "weights" / "last.pt")
    return {stage: root / stage for stage in ("mine", "cluster", "pretext")}


def build(digits: Path, products: dict[str, Path], *overrides: str, world: World | None = None) -> ScanMix:
    config = load_config(REPOSITORY / "tests" / "digits.yaml", (f"data.root={digits}", *SETTINGS, *overrides))
    method = ScanMix(open_context(config, world, products=products))
    method.start()
    return method


def network(method: ScanMix, number: int = 0) -> Network:
    model: Network = method.engines[number].model
    return model


def copies(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def changed(before: State, after: State) -> set[str]:
    """Which parts of a network are not as before: backbone, statistics, head, cluster_head."""
    parts = set()
    for name, value in before.items():
        if not torch.equal(value, after[name]):
            statistics = "running" in name or "num_batches" in name
            parts.add("statistics" if statistics else name.partition(".")[0])
    return parts


def test_both_networks_and_all_heads_begin_from_the_clustering(digits: Path, products: dict[str, Path]) -> None:
    method = build(digits, products)
    state = torch.load(products["cluster"] / "weights" / "best.pt", weights_only=True)["networks"][0]
    for number in (0, 1):
        assert all(
            torch.equal(value, state[name]) for name, value in network(method, number).classifier_state().items()
        )
        assert torch.equal(network(method, number).heads["cluster"].weight, state["head.weight"])


def phase_changes(world: World, digits: Path, products: dict[str, Path]) -> dict[str, set[str]]:
    """What each kind of pass changes in the network that it trains."""
    method = build(digits, products, world=world)
    found = {}
    passes = {
        "warmup": task_of(method, 0, "net0"),
        "sweep": task_of(method, 2, "sweep"),
        "ssl": task_of(method, 2, "net0"),
        "cluster": task_of(method, 2, "cluster0"),
    }
    for name, task in passes.items():
        before = copies(network(method).state_dict())
        run_pass(method.context, task, None if name == "sweep" else 3)
        found[name] = changed(before, network(method).state_dict())
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_each_phase_trains_its_part_of_the_network(size: int, digits: Path, products: dict[str, Path]) -> None:
    """Algorithms 3.b C and D4: a head that is idle keeps still, weight decay and momentum included."""
    for found in run_ranks(phase_changes, size, digits, products):
        assert found["warmup"] == {"head", "statistics"}
        assert found["sweep"] == set()
        assert found["ssl"] == {"backbone", "head", "statistics"}
        assert found["cluster"] == {"backbone", "cluster_head", "statistics"}


def clustering_step(world: World, digits: Path, products: dict[str, Path]) -> dict[str, Any]:
    """One step of network 0: what went in and what came out on this rank."""
    settings = ("optim.momentum=0", "optim.weight_decay=0", "method.scanmix.lambda_e=3")
    method = build(digits, products, *settings, world=world)
    method.noise_rate = 0.9
    rng = np.random.default_rng(0)
    for number in (0, 1):
        column = rng.integers(10, size=1437)
        method.context.table[f"predicted{number}"].numpy()[:] = column[method.context.table.owned]
    task = task_of(method, 2, "cluster0")
    plan = task.plan()
    task.start(plan.num_steps, 0)
    batch = next(iter(Stream(method.context.train, method.context.labels, plan)))
    pairs = [batch[role] for role in ("anchors", "neighbours")]
    view = method.context.named_view("strong")
    images = [
        method.context.view(b, 2, f"cluster0/{role}", view)
        for role, b in zip(("anchors", "neighbours"), pairs, strict=True)
    ]
    before = copies(network(method).state_dict())
    loss = float(task.step(batch, 0)["loss"])
    found = {"ids": [b.ids for b in pairs], "images": images, "before": before, "loss": loss, "predicted1": column}
    return found | {"after": copies(network(method).state_dict())}


@pytest.mark.parametrize("size", [1, 2])
def test_one_clustering_step_against_the_equation(size: int, digits: Path, products: dict[str, Path]) -> None:
    """Anchors and neighbours are forwards of their own, as published (our own reference of loss and descent)."""
    results = run_ranks(clustering_step, size, digits, products)
    graph, other = np.load(products["mine"] / "tables" / GRAPH_FILE), results[0]["predicted1"]
    for result in results:
        for anchor, partner in zip(*(ids.tolist() for ids in result["ids"]), strict=True):
            valid = [j for j in (anchor, *graph[anchor]) if other[j] == other[anchor]]
            assert partner in valid, "by the other network's predictions"

    model = build_model("small_cnn", 10).add("cluster", nn.Linear(128, 10))
    model.load_state_dict(results[0]["before"])
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("head.")}
    log_p: list[list[Tensor]] = []
    for result in results:
        running = copies(dict(model.named_buffers()))  # the rank's own
        calls = tuple((part, "cluster") for part in result["images"])
        log_p.append([logits.log_softmax(1) for logits in functional_call(model, running, calls)])
        for name, value in running.items():
            torch.testing.assert_close(result["after"][name], value, rtol=1e-5, atol=1e-6)
    p_a, p_n = (torch.cat([pair[n] for pair in log_p]).exp() for n in (0, 1))
    mean = p_a.mean(0)
    loss = -(p_a * p_n).sum(1).log().mean() + 3 * (mean * mean.log()).sum()
    assert np.mean([result["loss"] for result in results]) == pytest.approx(loss.item(), rel=1e-4)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for (name, old), gradient in zip(parameters.items(), gradients, strict=True):
        for result in results:
            torch.testing.assert_close(result["after"][name], old.detach() - 1e-3 * gradient, rtol=1e-3, atol=1e-6)


class Swept:
    """A finished sweep of which these shares turn out to be clean."""

    def __init__(self, *shares: float) -> None:
        self.shares = {str(number): share for number, share in enumerate(shares)}
        self.losses = {name: np.linspace(0, 1, 1437) for name in self.shares}

    def divided(self, name: str, split: Split) -> dict[str, float]:
        return {f"labelled_share{name}": self.shares[name]}


@pytest.mark.parametrize(("share", "high"), [(0.5, False), (0.3, True)])
def test_the_estimated_noise_rate_switches_views_and_rate(
    share: float, high: bool, digits: Path, products: dict[str, Path]
) -> None:
    method = build(digits, products)
    assert method.divide(Swept(share - 0.05, share + 0.05))["noise_rate"] == pytest.approx(1 - share)  # type: ignore[arg-type]
    method.divide(Swept(1.0, 1.0))  # type: ignore[arg-type]
    assert method.noise_rate == pytest.approx(1 - share), "estimated once"
    context = method.context
    expected = context.named_view("strong") if high else context.train_view
    assert method.ssl_view is expected
    assert method.cluster_view is expected
    assert method.warmup_view is context.named_view("strong")
    rates = []
    task = task_of(method, 2, "cluster0")
    task.engine.step = lambda loss, rate: rates.append(rate)  # type: ignore[attr-defined]
    run_pass(method.context, task, 1)
    assert rates == [1e-3 if high else 1e-5]


def test_the_sweep_estimates_the_noise_rate(digits: Path, products: dict[str, Path]) -> None:
    method = build(digits, products)
    metrics = run_pass(method.context, task_of(method, 2, "sweep"))
    shares = [(method.context.table[f"clean{n}"].numpy() > 0.5).mean() for n in (0, 1)]
    assert metrics["noise_rate"] == pytest.approx(1 - np.mean(shares))
    again = build(digits, products)
    again.load_state_dict(method.state_dict())
    assert again.noise_rate == method.noise_rate


def test_clustering_passes_can_be_rarer_fewer_or_none(digits: Path, products: dict[str, Path]) -> None:
    def names(epoch: int, *overrides: str) -> list[str]:
        phase = build(digits, products, *overrides).phases()[1]
        return [task.name for task in phase.passes(epoch)]

    whole = ["sweep", "net0", "net1", "cluster0", "cluster1"]
    assert names(2) == names(3) == whole
    assert names(2, "method.scanmix.cluster_every=2") == whole
    assert names(3, "method.scanmix.cluster_every=2") == whole[:3]
    assert names(3, "method.scanmix.cluster_every=null") == whole[:3]
    method = build(digits, products, "method.scanmix.anchors=100")
    method.noise_rate = 0.5
    plans = [task_of(method, epoch, "cluster0").plan() for epoch in (2, 3)]
    seen = [{int(i) for k in range(plan.num_steps) for i in plan.step(k)["anchors"].ids} for plan in plans]
    assert [len(ids) for ids in seen] == [100, 100]
    assert seen[0] != seen[1]


def test_the_weights_are_those_of_plain_classifiers(digits: Path, products: dict[str, Path]) -> None:
    method = build(digits, products)
    plain = build_model("small_cnn", 10)
    plain.load_state_dict(method.weights()[0])
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(2 * plain.eval().logits(images), method.logits(images))


# SCAN


def build_scan(digits: Path, products: dict[str, Path], *overrides: str, world: World | None = None) -> Scan:
    config = load_config(REPOSITORY / "tests" / "digits.yaml", (f"data.root={digits}", *SETTINGS, *overrides))
    context = open_context(config, world, CLUSTER, products)
    method = Scan(context)
    method.start()
    return method


def test_scan_trains_on_all_but_what_it_keeps_apart(digits: Path, products: dict[str, Path]) -> None:
    method = build_scan(digits, products, "cluster.holdout=0.1")
    plan = method.phases()[0].passes(0)[0].plan()
    anchors = {int(i) for k in range(plan.num_steps) for i in plan.step(k)["anchors"].ids}
    kept = ValidationPass(method).plan()
    validated = {int(i) for k in range(kept.num_steps) for i in kept.step(k)["anchors"].ids}
    assert len(validated) == 144
    assert anchors | validated == set(range(1437))
    assert not anchors & validated


def validation(world: World, digits: Path, products: dict[str, Path]) -> dict[str, Any]:
    method = build_scan(digits, products, "cluster.num_heads=3", world=world)
    return run_pass(method.context, ValidationPass(method)) | {"best_head": method.best_head}


def test_the_validation_score_is_that_of_the_best_head_on_any_number_of_ranks(
    digits: Path, products: dict[str, Path]
) -> None:
    method = build_scan(digits, products, "cluster.num_heads=3")
    graph = np.load(products["mine"] / "tables" / GRAPH_FILE)
    pixels = {int(i): x for i, x in all_images(method)}
    with torch.no_grad():
        log_p = {i: method.all_logits(x[None])[0].double().log_softmax(1) for i, x in pixels.items()}
    scores = []
    for head in range(3):
        pairs = [
            (log_p[a][head] + log_p[int(n)][head]).logsumexp(0) for a in method.kept_apart for n in (a, *graph[a][:5])
        ]
        mean = torch.stack([log_p[int(a)][head].exp() for a in method.kept_apart]).mean(0)
        scores.append(float(torch.stack(pairs).mean() - (mean * mean.log()).sum()))
    for size in (1, 2, 3):
        for result in run_ranks(validation, size, digits, products):
            assert result["validation_score"] == pytest.approx(max(scores), abs=1e-4)
            assert result["best_head"] == int(np.argmax(scores))


def all_images(method: Scan) -> list[tuple[int, Tensor]]:
    plan = method.context.sweep(1437)
    found: list[tuple[int, Tensor]] = []
    for batches in Stream(method.context.train, None, plan):
        batch = batches["all"]
        found += zip(batch.ids.tolist(), method.context.fixed_view(batch), strict=True)
    return found


def test_the_result_is_a_classifier_with_the_chosen_head(digits: Path, products: dict[str, Path]) -> None:
    method = build_scan(digits, products, "cluster.num_heads=4")
    method.best_head = 2
    plain = build_model("small_cnn", 10)
    plain.load_state_dict(method.weights()[0])
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval().logits(images), method.logits(images))
    again = build_scan(digits, products, "cluster.num_heads=4")
    state = method.state_dict()
    again.load_state_dict(state)
    assert again.best_head == 2
    del state["num_scored"]
    with pytest.raises(UserError, match=r"begun when SCAN's score of an epoch was another \(nldist 0\.1\); delete it"):
        again.load_state_dict(state)


def test_scan_with_a_frozen_backbone_trains_the_head_alone(digits: Path, products: dict[str, Path]) -> None:
    method = build_scan(digits, products, "cluster.head_only=true")
    before = copies(method.engines[0].model.state_dict())
    run_pass(method.context, task_of(method, 0, "cluster0"), 3)
    after = method.engines[0].model.state_dict()
    assert changed(before, after) == {"cluster_head"}


def one_step_on_parts(
    world: World, digits: Path, products: dict[str, Path], counts: tuple[int, ...]
) -> tuple[float, State]:
    """One step of SCAN on as many pairs as `counts` says for this rank, of the same seven pairs."""
    settings = ("cluster.head_only=true", "cluster.optim.name=sgd", "cluster.optim.lr=0.5", "cluster.num_heads=2")
    method = build_scan(digits, products, *settings, "cluster.batch_size=7", world=world)
    (task,) = method.phases()[0].passes(0)
    whole = next(
        iter(Stream(method.context.train, None, task_of(build_scan(digits, products, *settings), 0, "cluster0").plan()))
    )
    start = sum(counts[: world.rank])
    rows = slice(start, start + counts[world.rank])
    batches = {role: Batch(*(value[:7][rows] for value in vars(batch).values())) for role, batch in whole.items()}
    task.start(10, 0)
    loss = task.step(batches, 0)["loss"]
    return float(loss), copies(method.engines[0].model.state_dict())


def test_a_step_with_uneven_rows_is_that_of_all_pairs_together(digits: Path, products: dict[str, Path]) -> None:
    """As where images could not be read: mean over all pairs, not over the ranks' means."""
    ((expected, state),) = run_ranks(one_step_on_parts, 1, digits, products, (7,))
    results = run_ranks(one_step_on_parts, 2, digits, products, (5, 2))
    assert np.mean([loss for loss, _ in results]) == pytest.approx(expected, rel=1e-5)
    for _, found in results:
        for name, value in state.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_step_without_a_whole_pair_is_told_and_not_trained_on(digits: Path, products: dict[str, Path]) -> None:
    method = build_scan(digits, products)
    (task,) = method.phases()[0].passes(0)
    batches = next(iter(method.context.stream("train", task.plan())))
    assert task.usable(batches)
    anchors, partners = batches["anchors"], batches["neighbours"]
    for left in (slice(0), slice(5, None)):
        few = Batch(*(value[left] for value in vars(partners).values()))
        found = whole_pairs(Batch(*(value[:5] for value in vars(anchors).values())), few)
        assert [len(rows) for rows in found] == [0, 0]
    assert not task.usable({"anchors": anchors, "neighbours": Batch(*(v[:0] for v in vars(partners).values()))})


def test_too_few_anchors_are_refused(digits: Path) -> None:
    config = load_config(REPOSITORY / "tests" / "digits.yaml", [f"data.root={digits}", "cluster.holdout=0.999"])
    with pytest.raises(UserError, match=r"cluster.holdout=0.999 leaves 1 anchors for 1 rank"):
        CLUSTER.check(config, Data.open(config.data), 1)
