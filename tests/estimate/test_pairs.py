import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nldist.dist.world import World
from nldist.errors import UserError
from nldist.estimate import pairs, scan
from nldist.estimate.graph import every_neighbour, neighbours_of, normalise
from nldist.estimate.neighbours import ShardedIndex
from tests.conftest import REPOSITORY
from tests.estimate.test_neighbours import clustered, exact_vectors, near_ties
from tests.memory import peak_growth

WORLD = World.single()


def nearest_others(vectors: np.ndarray, k: int) -> np.ndarray:
    """By brute force in float64, for vectors with exact products."""
    scores = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def graph_of(vectors: np.ndarray, k: int) -> np.ndarray:
    return every_neighbour(ShardedIndex.build(vectors, WORLD), k)


@pytest.mark.parametrize("dim", [1, 7, 24])
@pytest.mark.parametrize("num_vectors", [21, 22, 29, 30, 1000, 3073, 3333])
def test_the_graph_is_that_of_brute_force(num_vectors: int, dim: int) -> None:
    vectors = exact_vectors(num_vectors, dim)
    graph = graph_of(vectors, 20)
    assert graph.dtype == np.int32
    np.testing.assert_array_equal(graph, nearest_others(vectors, 20))


def with_copies(num_vectors: int) -> np.ndarray:
    """Some hundred copies of one vector, spread over all, pairs of copies, and zeros."""
    vectors = exact_vectors(num_vectors, 24)
    random = np.random.default_rng(5)
    vectors[random.choice(num_vectors, 300, replace=False)] = vectors[7]
    vectors[random.choice(num_vectors, 60, replace=False)] = 0
    vectors[-200:] = vectors[100:300]
    return vectors


@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("vectors", [with_copies(3333), near_ties(3333, 50)], ids=["copies", "near ties"])
def test_ties_go_by_id_and_near_ties_by_exact_scores(vectors: np.ndarray, k: int) -> None:
    np.testing.assert_array_equal(graph_of(vectors, k), nearest_others(vectors, k))


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_threads_share_the_work() -> None:
    vectors = exact_vectors(5000, 24)
    vectors[::7] = vectors[3]
    np.testing.assert_array_equal(graph_of(vectors, 20), nearest_others(vectors, 20))
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_an_error_on_one_thread_ends_the_search_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = itertools.count(), scan.scan
    running: list[int] = []

    def fails_once(*args: Any) -> None:
        if (call := next(calls)) == 5:
            raise MemoryError
        running.append(call)
        real(*args)
        running.remove(call)

    monkeypatch.setattr(scan, "scan", fails_once)
    with pytest.raises(MemoryError):
        graph_of(exact_vectors(5000, 24), 20)
    assert not running
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("vector", [np.zeros(5), np.ones(5)])
def test_nothing_but_copies(vector: np.ndarray) -> None:
    vectors = np.tile(vector, (3100, 1)).astype(np.float32)
    np.testing.assert_array_equal(graph_of(vectors, 20), nearest_others(vectors, 20))


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_very_short_and_very_long_vectors(scale: float) -> None:
    vectors = exact_vectors(300, 12)
    np.testing.assert_array_equal(graph_of(vectors * np.float32(scale), 10), nearest_others(vectors, 10))


@pytest.mark.parametrize("order", ["random", "by cluster", "drifting"])
def test_it_is_the_graph_of_a_search(order: str) -> None:
    vectors = clustered(5300, 33)
    if order == "by cluster":
        vectors = vectors[np.argsort(vectors @ vectors[0])]
    if order == "drifting":  # each is more similar to the next ones than to those before
        vectors[:, 0] += np.linspace(0, 9, len(vectors))
    index = ShardedIndex.build(normalise(vectors), WORLD)
    np.testing.assert_array_equal(every_neighbour(index, 20), neighbours_of(index, index.owned, 20))


def test_every_other_vector_as_a_neighbour() -> None:
    vectors = exact_vectors(60, 6)
    np.testing.assert_array_equal(graph_of(vectors, 59), nearest_others(vectors, 59))
    with pytest.raises(UserError, match="60 samples do not have 60 neighbours each; lower k to 59 at most"):
        graph_of(vectors, 60)


def test_the_lists_are_what_a_search_adds_to_the_memory() -> None:
    vectors = clustered(60_000, 32)
    graph_of(vectors[:2000], 20)  # imports and compiles
    lists = vectors[:, :1].nbytes * (2 * pairs.num_candidates(20) + 20)
    assert peak_growth(lambda: graph_of(vectors, 20)) < lists + 40 * 2**20


COMPILE = "import runpy, sys; print(len(runpy.run_path(sys.argv[1])['scan'].stats.cache_hits))"


def compiled(source: Path, home: Path) -> subprocess.Popen:
    """A process that compiles the scan, and says what of it was already there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "XDG"))}
    command = [sys.executable, "-c", COMPILE, str(source)]
    return subprocess.Popen(command, env=environment | {"HOME": str(home)}, stdout=subprocess.PIPE, text=True)


def copy_of_scan(directory: Path) -> Path:
    return Path(shutil.copy(REPOSITORY / "nldist/estimate/scan.py", directory))


def test_processes_that_compile_at_the_same_time_share_what_they_keep(tmp_path: Path) -> None:
    source = copy_of_scan(tmp_path)
    processes = [compiled(source, tmp_path) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0] * 3
    later = compiled(source, tmp_path)
    assert later.communicate(timeout=120)[0].split() == ["1"]
    assert later.returncode == 0


def test_without_a_directory_to_keep_it_in_the_scan_is_compiled_all_the_same(tmp_path: Path) -> None:
    source, home = copy_of_scan(tmp_path), tmp_path / "home"
    for directory in (tmp_path / "__pycache__", home):
        directory.write_text("a file: not even root can make this directory")
    process = compiled(source, home)
    assert process.communicate(timeout=120)[0].split() == ["0"]
    assert process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["__pycache__", "home", "scan.py"]
