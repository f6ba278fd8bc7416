"""Neighbours over real processes: the same for any number of ranks and any ownership, and as by brute force."""

from pathlib import Path

import numpy as np
import pytest

from nldist.data.index import owned
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.estimate.graph import GraphFile, neighbours_of, normalise, open_graph, purity
from nldist.estimate.neighbours import ShardedIndex
from tests.estimate.test_neighbours import brute_force, clustered, exact_vectors, near_ties, recall
from tests.ranks import run_ranks

NUM_VECTORS = 403
# Where each rank's vectors and queries end: a rank without any, a rank with one.
VECTOR_BOUNDS = {1: [0, 403], 2: [0, 1, 403], 3: [0, 190, 190, 403], 4: [0, 0, 130, 131, 403]}
QUERY_BOUNDS = {1: [0, 90], 2: [0, 90, 90], 3: [0, 1, 60, 90], 4: [0, 40, 40, 41, 90]}


def with_duplicates() -> np.ndarray:
    vectors = exact_vectors(NUM_VECTORS, 24)
    vectors[50:180] = vectors[390]
    vectors[::7] = vectors[3]
    vectors[::11] = 0
    return vectors


DATA = {
    "random": exact_vectors(NUM_VECTORS, 24),
    "duplicates": with_duplicates(),
    "near-ties": near_ties(NUM_VECTORS, 50),
}


def part(world: World, rows: np.ndarray, bounds: dict[int, list[int]]) -> np.ndarray:
    return rows[bounds[world.size][world.rank] : bounds[world.size][world.rank + 1]]


def search(world: World, vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    index = ShardedIndex.build(part(world, vectors, VECTOR_BOUNDS), world)
    return index.search(part(world, queries, QUERY_BOUNDS), k)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("k", [1, 21, NUM_VECTORS - 1])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_search_equals_brute_force(world_size: int, k: int, kind: str) -> None:
    vectors = DATA[kind]
    queries = vectors[np.random.default_rng(0).choice(NUM_VECTORS, 90)]
    expected_scores, expected_ids = brute_force(queries, vectors, k)
    ranks = run_ranks(search, world_size, vectors, queries, k)
    scores, ids = (np.concatenate(column) for column in zip(*ranks, strict=True))
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


def search_in_blocks(world: World, vectors: np.ndarray) -> np.ndarray:
    own = vectors[: 5000 if world.rank else 4500]
    return ShardedIndex.build(vectors[:50], world).search(own, 3)[1]


def test_more_queries_than_are_searched_at_a_time() -> None:
    vectors = exact_vectors(5000, 8)
    _, expected = brute_force(vectors, np.tile(vectors[:50], (2, 1)), 3)
    for ids in run_ranks(search_in_blocks, 2, vectors):
        np.testing.assert_array_equal(ids, expected[: len(ids)])


def graph_of(world: World, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The graph at once, and again in blocks as a trainer's steps make it."""
    own = part(world, features, VECTOR_BOUNDS)
    index = ShardedIndex.build(normalise(own), world)
    steps = [index.owned[start : start + 60] for start in range(0, NUM_VECTORS, 60)]
    return neighbours_of(index, index.owned, k), np.concatenate([neighbours_of(index, ids, k) for ids in steps])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_graph_is_the_same_for_any_number_of_ranks(world_size: int) -> None:
    features = with_duplicates() + np.float32(0.1)
    unit = normalise(features).astype(np.float64)
    scores = np.round(unit @ unit.T, 12)  # BLAS rounds the scores of duplicates differently
    np.fill_diagonal(scores, -np.inf)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :20]
    ranks = run_ranks(graph_of, world_size, features, 20)
    for column in zip(*ranks, strict=True):
        np.testing.assert_array_equal(np.concatenate(column), expected)


def approximate(world: World, vectors: np.ndarray, factory: str) -> np.ndarray:
    own = owned(len(vectors), world.rank, world.size)
    index = ShardedIndex.build(vectors[own.start : own.stop], world, factory=factory, num_probe=1)
    return neighbours_of(index, own[:50], 10)


def test_one_trained_index_for_all_ranks_whatever_their_number() -> None:
    vectors = clustered(1600, 16)
    lists = [run_ranks(approximate, size, vectors, "IVF16,Flat")[0] for size in (1, 2, 3, 4)]
    for other in lists[1:]:
        np.testing.assert_array_equal(other, lists[0])
    exact = ShardedIndex.build(vectors, World.single())
    assert recall(lists[0], neighbours_of(exact, range(50), 10)) > 0.7


def refusal(world: World, vectors: np.ndarray, factory: str) -> str:
    try:
        ShardedIndex.build(part(world, vectors, VECTOR_BOUNDS), world, factory=factory)
    except UserError as error:
        return str(error)
    return "no error"


def test_what_one_rank_sees_fails_every_rank() -> None:
    broken = DATA["random"].copy()
    broken[400] = np.nan
    for vectors, factory, message in (
        (broken, "Flat", "1 of 403 vectors have no neighbours"),
        (DATA["random"], "IVF500,Flat", "cannot be trained: Number of training points (403)"),
    ):
        first, *rest = run_ranks(refusal, 3, vectors, factory)
        assert message in first
        assert rest == [first] * 2


def write_graph(world: World, path: Path, graph: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    file = GraphFile(path, len(graph), graph.shape[1], world)
    own = owned(len(graph), world.rank, world.size)
    for ids in reversed([own[start : start + 40] for start in range(0, len(own), 40)]):
        file.write(ids.start, graph[ids.start : ids.stop])
    file.finish()
    return np.array(open_graph(path)), purity(graph[own.start : own.stop], own, labels, world)


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_write_one_graph(tmp_path: Path, world_size: int) -> None:
    random = np.random.default_rng(0)
    graph, labels = random.integers(0, 203, (203, 5)).astype(np.int32), random.integers(0, 4, 203)
    expected = (labels[graph] == labels[:, None]).mean(axis=0)
    for written, shares in run_ranks(write_graph, world_size, tmp_path / "graph.npy", graph, labels):
        np.testing.assert_array_equal(written, graph)
        np.testing.assert_allclose(shares, expected)
