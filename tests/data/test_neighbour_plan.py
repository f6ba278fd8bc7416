import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nldist.data.index import owned
from nldist.data.neighbour_plan import nearest, neighbourhoods, neighbours
from nldist.data.plan import Plan, shuffled, sweep

N, K = 103, 6


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.choice(np.delete(np.arange(N), i), K, replace=False) for i in range(N)])
    np.save(tmp_path / "graph.npy", rows.astype(np.int32))
    return tmp_path / "graph.npy"


def pairs(size: int, graph: Path, **options: Any) -> dict[int, int]:
    """Anchor -> neighbour, over all ranks and steps."""
    settings: dict[str, Any] = {"batch_size": 8, "seed": 3, "epoch": 1, "window": None} | options
    found: dict[int, int] = {}
    plans: list[Plan] = [neighbours(N, graph, rank=rank, size=size, **settings) for rank in range(size)]
    assert len({plan.num_steps for plan in plans}) == 1
    for plan in plans:
        for k in range(plan.num_steps):
            step = plan.step(k)
            anchors, partners = step["anchors"], step["neighbours"]
            assert np.array_equal(anchors.draws, partners.draws), "a pair is named by its anchor"
            assert not set(anchors.ids.tolist()) & found.keys(), "each anchor once"
            found |= zip(anchors.ids.tolist(), partners.ids.tolist(), strict=True)
    return found


def test_every_anchor_once_and_the_same_pairs_for_any_world(graph: Path) -> None:
    predicted = np.random.default_rng(1).integers(3, size=N).astype(np.int16)
    one = pairs(1, graph, predicted=predicted)
    assert sorted(one) == list(range(N))
    for size in (2, 3, 4):
        assert pairs(size, graph, predicted=predicted) == one


@pytest.mark.parametrize("include_self", [True, False])
def test_only_valid_neighbours_are_drawn_and_each_equally_often(graph: Path, include_self: bool) -> None:
    predicted = np.random.default_rng(1).integers(2, size=N).astype(np.int16)
    rows = np.load(graph)
    counts = np.zeros((N, N), int)
    num_epochs = 400
    for epoch in range(num_epochs):
        for anchor, partner in pairs(1, graph, predicted=predicted, epoch=epoch, include_self=include_self).items():
            counts[anchor, partner] += 1
    for anchor in range(N):
        listed = [anchor, *rows[anchor]] if include_self else list(rows[anchor])
        valid = [j for j in listed if predicted[j] == predicted[anchor]] or listed
        assert set(np.flatnonzero(counts[anchor])) <= set(valid)
        expected = num_epochs / len(valid)
        assert np.abs(counts[anchor, valid] - expected).max() < 6 * np.sqrt(expected), anchor


def test_where_no_neighbour_is_valid_all_are(graph: Path) -> None:
    found = pairs(2, graph, predicted=np.arange(N, dtype=np.int16), include_self=False)
    rows = np.load(graph)
    assert all(partner in rows[anchor] for anchor, partner in found.items())
    alone = pairs(2, graph, predicted=np.arange(N, dtype=np.int16))
    assert all(partner == anchor for anchor, partner in alone.items()), "with itself in the list, it is valid"


def test_a_population_limits_the_anchors_but_not_the_neighbours(graph: Path) -> None:
    population = np.arange(0, N, 5)
    found = pairs(3, graph, population=population)
    assert sorted(found) == population.tolist()
    assert not set(found.values()) <= set(population.tolist())


def test_epochs_differ_and_a_step_does_not_depend_on_the_ones_before(graph: Path) -> None:
    assert pairs(1, graph, epoch=1) != pairs(1, graph, epoch=2)
    plan, again = (neighbours(N, graph, rank=0, size=2, batch_size=8, seed=3, epoch=1, window=16) for _ in range(2))
    for k in range(plan.num_steps):
        plan.step(k)
    for role in ("anchors", "neighbours"):
        assert np.array_equal(plan.step(4)[role].ids, again.step(4)[role].ids)


def test_pickling_a_plan_sends_the_path_and_not_the_graph(graph: Path) -> None:
    big = graph.with_name("big.npy")
    np.save(big, np.zeros((100_000, 20), np.int32))
    plan = neighbours(100_000, big, rank=0, size=1, batch_size=8, seed=0, epoch=0, window=None)
    first = plan.step(0)
    sent = pickle.dumps(plan)
    assert len(sent) < 10_000
    assert np.array_equal(pickle.loads(sent).step(0)["neighbours"].ids, first["neighbours"].ids)


def test_nearest_gives_each_owned_anchor_with_its_first_neighbours(graph: Path) -> None:
    rows, population = np.load(graph), np.arange(1, N, 3)
    for size in (1, 2, 3):
        seen = []
        for rank in range(size):
            plan = nearest(N, graph, 5, rank=rank, size=size, batch_size=4, population=population)
            anchors = sweep(N, rank=rank, size=size, batch_size=4, population=population)
            assert plan.num_steps == anchors.num_steps
            for k in range(plan.num_steps):
                step = plan.step(k)
                ids = step["anchors"].ids
                assert np.array_equal(step["neighbours"].ids.reshape(-1, 5), rows[ids][:, :5])
                assert np.array_equal(step["neighbours"].draws, ids.repeat(5))
                seen += ids.tolist()
        assert seen == population.tolist()


def test_a_neighbourhood_has_all_neighbours_of_an_anchor_under_names_of_their_own() -> None:
    rows = np.random.default_rng(0).integers(N, size=(N, 3)).astype(np.int32)
    for size in (1, 2, 3):
        seen = []
        for rank in range(size):
            mine = owned(N, rank, size)
            anchors = shuffled(N, rank=rank, size=size, batch_size=8, seed=3, epoch=1, window=None)
            plan = neighbourhoods(N, anchors, rows[mine.start : mine.stop], mine.start)
            assert plan.num_steps == anchors.num_steps
            for k in range(plan.num_steps):
                step = plan.step(k)
                ids, draws = step["anchors"].ids, step["neighbours"].draws
                assert np.array_equal(step["neighbours"].ids.reshape(-1, 3), rows[ids])
                assert len(set(draws.tolist())) == len(draws)
                assert np.array_equal(draws % N, ids.repeat(3)), "by the anchor, and which of its neighbours it is"
                seen += ids.tolist()
        assert sorted(seen) == list(range(N))
