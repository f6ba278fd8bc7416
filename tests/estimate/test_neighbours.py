import os
import signal
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from nldist.dist.world import World
from nldist.errors import UserError
from nldist.estimate import neighbours
from nldist.estimate.graph import GraphFile, neighbours_of, normalise, open_graph, purity
from nldist.estimate.neighbours import ShardedIndex
from nldist.estimate.shard import dots
from tests.memory import peak_growth
from tests.ranks import CONTEXT

WORLD = World.single()


def exact_vectors(num_vectors: int, dim: int, seed: int = 0) -> np.ndarray:
    """Random multiples of 1/256: float64 sums of their products are exact, in any order."""
    random = np.random.default_rng(seed)
    return (np.rint(random.normal(size=(num_vectors, dim)) * 256) / 256).astype(np.float32)


def near_ties(num_vectors: int, dim: int) -> np.ndarray:
    """Vectors that differ by so little that float32 can't put their scores in order."""
    random = np.random.default_rng(1)
    centre = np.rint(random.normal(size=dim) * 65_536)
    return ((centre + random.integers(-1, 2, (num_vectors, dim))) / 65_536).astype(np.float32)


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best by (descending score, ascending id), for vectors with exact products."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def clustered(num_vectors: int, dim: int, num_clusters: int = 20) -> np.ndarray:
    random = np.random.default_rng(2)
    centres = random.normal(size=(num_clusters, dim))
    members = centres[random.integers(num_clusters, size=num_vectors)]
    return normalise(members + 0.3 * random.normal(size=(num_vectors, dim)))


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, wanted, strict=True)]))


@pytest.mark.parametrize("dim", [1, 7, 8, 9, 50, 127, 128])
def test_a_score_depends_on_its_two_vectors_alone(dim: int) -> None:
    random = np.random.default_rng(0)
    queries = torch.from_numpy(random.normal(size=(40, dim)).astype(np.float32))
    lists = torch.from_numpy(random.normal(size=(40, 30, dim)).astype(np.float32))
    scores = dots(queries, lists)
    np.testing.assert_allclose(scores, np.einsum("bd,bcd->bc", queries.double(), lists.double()), atol=1e-13)
    for row, column in ((0, 0), (39, 29), (17, 3)):
        alone = dots(queries[row, None], lists[row, None, column, None])
        assert alone.item() == scores[row, column].item()


def test_near_ties_are_put_in_order() -> None:
    vectors = near_ties(3000, 50)
    expected = brute_force(vectors[:60], vectors, 21)
    _, rough = faiss.knn(vectors[:60], vectors, 21, metric=faiss.METRIC_INNER_PRODUCT)
    assert recall(rough, expected[1]) < 0.99  # or this would be no test
    scores, ids = ShardedIndex.build(vectors, WORLD).search(vectors[:60], 21)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


def test_more_duplicates_than_faiss_can_list() -> None:
    vectors = np.concatenate([exact_vectors(700, 6), np.tile(exact_vectors(1, 6, 9), (2500, 1)), np.zeros((300, 6))])
    vectors = np.random.default_rng(3).permutation(vectors).astype(np.float32)
    queries = np.concatenate([vectors[:50], vectors[:50]])
    scores, ids = ShardedIndex.build(vectors, WORLD).search(queries, 5)
    expected_scores, expected_ids = brute_force(queries, vectors, 5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_very_short_and_very_long_vectors(scale: float) -> None:
    vectors = (exact_vectors(300, 12) * np.float32(scale)).astype(np.float32)
    _, ids = ShardedIndex.build(vectors, WORLD).search(vectors, 10)
    np.testing.assert_array_equal(ids, brute_force(exact_vectors(300, 12), exact_vectors(300, 12), 10)[1])


def test_fewer_vectors_than_k() -> None:
    vectors = exact_vectors(3, 5)
    scores, ids = ShardedIndex.build(vectors, WORLD).search(vectors[:2], 5)
    np.testing.assert_array_equal(ids[:, 3:], -1)
    np.testing.assert_array_equal(scores[:, 3:], -np.inf)
    np.testing.assert_array_equal(ids[:, :3], brute_force(vectors[:2], vectors, 3)[1])


def test_no_queries_and_no_vectors() -> None:
    index = ShardedIndex.build(exact_vectors(30, 5), WORLD)
    assert [part.shape for part in index.search(np.empty((0, 5), np.float32), 4)] == [(0, 4), (0, 4)]
    empty = ShardedIndex.build(np.empty((0, 5), np.float32), WORLD)
    np.testing.assert_array_equal(empty.search(exact_vectors(2, 5), 3)[1], np.full((2, 3), -1))


@pytest.mark.parametrize("k", [0, 513])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.512"):
        ShardedIndex.build(exact_vectors(30, 5), WORLD).search(exact_vectors(2, 5), k)


def test_probing_every_list_is_exact() -> None:
    vectors = clustered(2000, 16)
    _, expected = ShardedIndex.build(vectors, WORLD).search(vectors[:200], 21)
    every = ShardedIndex.build(vectors, WORLD, factory="IVF16,Flat", num_probe=16)
    np.testing.assert_array_equal(every.search(vectors[:200], 21)[1], expected)
    few = ShardedIndex.build(vectors, WORLD, factory="IVF16,Flat", num_probe=1)
    assert 0.7 < recall(few.search(vectors[:200], 21)[1], expected) < 1


@pytest.mark.parametrize("factory", ["IVF1600,Flat", "IVF1600_HNSW32,SQ8", "PCA8,IVF1600,Flat"])
def test_many_lists_are_placed_as_well_as_by_one_k_means(factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = clustered(16_000, 16)
    _, expected = ShardedIndex.build(vectors, WORLD).search(vectors[:300], 11)

    def found() -> float:
        index = ShardedIndex.build(vectors, WORLD, factory=factory, num_probe=8)
        return recall(index.search(vectors[:300], 11)[1], expected)

    by_two_levels = found()
    monkeypatch.setattr(neighbours, "_ONE_LEVEL", 1600)
    assert found() - 0.02 < by_two_levels < 1


def test_many_lists_are_placed_where_most_vectors_are_the_same() -> None:
    """Some clusters are too small for a list of their own, which FAISS's clustering in two levels refuses."""
    vectors = np.concatenate([np.tile(clustered(1, 8), (4000, 1)), clustered(10, 8)])
    empty = faiss.index_factory(8, "IVF1100,Flat", faiss.METRIC_INNER_PRODUCT)
    trained = faiss.deserialize_index(neighbours._train(empty, vectors, WORLD, "IVF1100,Flat", 0))
    assert trained.is_trained
    assert faiss.extract_index_ivf(trained).quantizer.ntotal == 1100


@pytest.mark.parametrize("factory", ["PQ4x4", "PCA6,Flat", "IVF8,PQ4x4", "SQ4"])
def test_candidates_of_approximate_indexes_are_scored_exactly(factory: str) -> None:
    vectors = clustered(2000, 16)
    _, expected = ShardedIndex.build(vectors, WORLD).search(vectors[:200], 21)
    stock = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
    stock.train(vectors)
    stock.add(vectors)
    unrefined = recall(stock.search(vectors[:200], 21)[1], expected)
    scores, ids = ShardedIndex.build(vectors, WORLD, factory=factory).search(vectors[:200], 21)
    assert recall(ids, expected) > unrefined + 0.05
    np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", vectors[:200], vectors[ids]), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factory": "Flatt"}, r"knows no index 'Flatt' of 6 dimensions: could not parse index string Flatt"),
        ({"factory": "PQ5"}, r"knows no index 'PQ5'.*multiple of the number of subquantizers"),
        ({"factory": "Flat", "num_probe": 3}, r"num_probe is for IVF indexes, 'Flat'"),
        ({"factory": "PQ3", "num_probe": 3}, r"num_probe is for IVF indexes, 'PQ3'"),
        ({"factory": "IVF64,Flat"}, r"'IVF64,Flat' cannot be trained: Number of training points \(40\)"),
        ({"factory": "IDMap,Flat"}, r"FAISS cannot use the index 'IDMap,Flat' here"),
    ],
)
def test_wrong_factory(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShardedIndex.build(exact_vectors(40, 6), WORLD, **settings)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e18])
def test_vectors_and_queries_must_be_finite(value: float) -> None:
    vectors = exact_vectors(40, 6)
    broken = vectors.copy()
    broken[[7, 9], 2] = value
    with pytest.raises(UserError, match=r"2 of 40 vectors have no neighbours.*on rank 0"):
        ShardedIndex.build(broken, WORLD)
    with pytest.raises(UserError, match="1 of 8 queries"):
        ShardedIndex.build(vectors, WORLD).search(broken[:8], 3)


def test_normalise() -> None:
    features = np.array([[3, 4], [0, 0], [1e-30, 0], [-1e30, 1e30]], np.float32)
    half = np.sqrt(0.5)
    expected = np.array([[0.6, 0.8], [0, 0], [1, 0], [-half, half]], np.float32)
    np.testing.assert_array_equal(normalise(features), expected)
    assert np.isnan(normalise(np.array([[np.inf, 1]], np.float32))).any()


def graph_of(features: np.ndarray, k: int) -> np.ndarray:
    index = ShardedIndex.build(normalise(features), WORLD)
    return neighbours_of(index, index.owned, k)


def test_features_are_normalised_in_place_without_a_copy() -> None:
    features = np.random.default_rng(0).normal(size=(100_000, 128)).astype(np.float32)
    expected = normalise(features)
    assert peak_growth(lambda: normalise(features, out=features)) < features.nbytes / 2
    np.testing.assert_array_equal(features, expected)


def test_the_graph_leaves_out_the_sample_and_not_its_duplicates() -> None:
    features = exact_vectors(12, 4)
    features[[2, 5, 6]] = 3 * features[9]
    graph = graph_of(features, 4)
    assert graph.dtype == np.int32
    np.testing.assert_array_equal(graph[[2, 5, 6, 9], :3], [[5, 6, 9], [2, 6, 9], [2, 5, 9], [2, 5, 6]])
    assert not (graph == np.arange(12)[:, None]).any()


def test_the_graph_of_equal_samples() -> None:
    np.testing.assert_array_equal(graph_of(np.ones((5, 3)), 2), [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]])
    np.testing.assert_array_equal(graph_of(np.zeros((3, 3)), 2), [[1, 2], [0, 2], [0, 1]])


def test_too_few_samples_for_k_neighbours() -> None:
    with pytest.raises(UserError, match="5 samples do not have 5 neighbours each; lower k to 4 at most"):
        graph_of(exact_vectors(5, 3), 5)
    index = ShardedIndex.build(clustered(400, 8), WORLD, factory="IVF40,Flat", num_probe=1)
    with pytest.raises(UserError, match="found fewer than 300 neighbours of 400 samples, the first of them 0"):
        neighbours_of(index, index.owned, 300)


def test_purity() -> None:
    random = np.random.default_rng(0)
    graph, labels = random.integers(0, 50, (50, 6)), random.integers(0, 3, 50)
    expected = [np.mean([labels[i] == labels[graph[i, j]] for i in range(50)]) for j in range(6)]
    np.testing.assert_allclose(purity(graph, range(50), labels, WORLD), expected)


def write_half_and_die(path: Path) -> None:
    file = GraphFile(path, 10, 3, WORLD)
    file.write(0, np.arange(15).reshape(5, 3))
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_no_graph_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "graph.npy"
    process = CONTEXT.Process(target=write_half_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [found.name for found in tmp_path.iterdir()] == ["graph.npy.part"]
    with pytest.raises(UserError, match="no neighbour graph"):
        open_graph(path)
    with pytest.raises(UserError, match="5 rows were not written"):
        GraphFile(path, 10, 3, WORLD).finish()
    file = GraphFile(path, 10, 3, WORLD)
    file.write(5, np.arange(15, 30).reshape(5, 3))
    file.finish()
    assert [found.name for found in tmp_path.iterdir()] == ["graph.npy"]
    graph = open_graph(path)
    np.testing.assert_array_equal(graph, np.arange(30).reshape(10, 3))
    assert graph.dtype == np.int32
    assert not graph.flags.writeable


def test_a_graph_finished_before_a_restart_is_gone_on_with(tmp_path: Path) -> None:
    """Killed between `finish` and the checkpoint that would say so: the run comes back at an earlier block."""
    path, rows = tmp_path / "graph.npy", np.arange(30).reshape(10, 3)
    file = GraphFile(path, 10, 3, WORLD)
    file.write(0, rows)
    file.finish()
    file = GraphFile(path, 10, 3, WORLD)
    file.write(8, rows[8:])
    file.finish()
    np.testing.assert_array_equal(open_graph(path), rows)


def test_a_part_of_another_shape_is_not_gone_on_with(tmp_path: Path) -> None:
    GraphFile(tmp_path / "graph.npy", 6, 2, WORLD).write(0, np.zeros((6, 2)))
    with pytest.raises(UserError, match="4 rows were not written"):
        GraphFile(tmp_path / "graph.npy", 4, 3, WORLD).finish()


def test_a_graph_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the neighbour graph cannot be written"):
        GraphFile(tmp_path / "absent" / "graph.npy", 6, 2, WORLD)
