"""The graph by pairs over real processes: the same for any number of ranks, any ownership and any interruption."""

from collections.abc import Sequence
from functools import cache, partial
from itertools import pairwise, product
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from nldist.dist.world import World
from nldist.errors import UserError
from nldist.estimate import pairs
from nldist.estimate.blocks import Blocks
from nldist.estimate.graph import every_neighbour
from nldist.estimate.neighbours import ShardedIndex
from nldist.estimate.pairs import PairSearch, num_candidates
from tests.estimate.test_neighbours import exact_vectors, near_ties
from tests.estimate.test_pairs import nearest_others, with_copies
from tests.ranks import run_ranks

NUM_VECTORS, K = 3181, 9
# Where each rank's vectors end: a rank without any, a rank with one, one with nearly all.
BOUNDS = {1: [0, 3181], 2: [0, 1100, 3181], 3: [0, 1700, 1700, 3181], 4: [0, 0, 3000, 3001, 3181]}
DATA = {"random": exact_vectors(NUM_VECTORS, 24), "copies": with_copies(NUM_VECTORS), "near ties": near_ties(3181, 50)}
# Many blocks of few vectors, in parts, as only large sets have them.
SMALL = partial(Blocks, least=100, part=40)

Lists = tuple[np.ndarray, np.ndarray]


def owned_by(world: World) -> slice:
    return slice(*BOUNDS[world.size][world.rank : world.rank + 2])


def graph_of(world: World, vectors: np.ndarray) -> np.ndarray:
    return every_neighbour(ShardedIndex.build(vectors[owned_by(world)], world), K)


def some_steps(world: World, vectors: np.ndarray, lists: Lists, steps: range) -> tuple[Lists, np.ndarray]:
    """Steps of a search that was begun elsewhere: the lists after them, and what was completed."""
    own = owned_by(world)
    scores, ids = (column[own].copy() for column in lists)
    graph = np.full((len(scores), K), -1, np.int32)
    with patch.object(pairs, "Blocks", SMALL):
        search = PairSearch(ShardedIndex.build(vectors[own], world), K, scores, ids)
        for step in steps:
            for rows, neighbours in search.step(step):
                graph[rows.start - own.start : rows.stop - own.start] = neighbours
    return (scores, ids), graph


@cache
def expected(kind: str) -> np.ndarray:
    return nearest_others(DATA[kind], K)


def in_pairs(ranks: Sequence[Any], quick: Sequence[tuple[Any, str]]) -> list[Any]:
    """Every kind on all ranks, of which `make test` takes what is quick: any ranks and any kind once or more."""
    return [
        pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow, id=f"{pair[0]}-{pair[1]}")
        for pair in product(ranks, DATA)
    ]


@pytest.mark.parametrize(
    ("world_size", "kind"),
    in_pairs((1, 2, 3, 4), [(1, "random"), (2, "near ties"), (3, "copies"), (3, "near ties"), (4, "random")]),
)
def test_the_graph_is_that_of_brute_force_on_any_ranks(world_size: int, kind: str) -> None:
    graph = np.concatenate(run_ranks(graph_of, world_size, DATA[kind]))
    np.testing.assert_array_equal(graph, expected(kind))


@pytest.mark.parametrize(
    ("world_sizes", "kind"),
    in_pairs(
        ((2, 2, 2), (3, 1, 4), (4, 2, 3)), [((2, 2, 2), "random"), ((3, 1, 4), "near ties"), ((4, 2, 3), "copies")]
    ),
)
def test_interrupted_it_goes_on_with_other_ranks(world_sizes: tuple[int, ...], kind: str) -> None:
    shape = NUM_VECTORS, num_candidates(K)
    lists: Lists = (np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32))
    graph = np.full((NUM_VECTORS, K), -1)
    with patch.object(pairs, "Blocks", SMALL):
        num_steps = pairs.num_steps(NUM_VECTORS)
    edges = [0, 7, num_steps - 1, num_steps]  # within a distance, and within the last steps
    for world_size, (start, stop) in zip(world_sizes, pairwise(edges), strict=True):
        ranks = run_ranks(some_steps, world_size, DATA[kind], lists, range(start, stop))
        lists = np.concatenate([rank[0][0] for rank in ranks]), np.concatenate([rank[0][1] for rank in ranks])
        graph = np.maximum(graph, np.concatenate([rank[1] for rank in ranks]))
    np.testing.assert_array_equal(graph, expected(kind))


def refusal(world: World, k: int) -> str:
    vectors = exact_vectors(5, 3)[[slice(0, 0), slice(0, 5)][world.rank]]
    try:
        every_neighbour(ShardedIndex.build(vectors, world), k)
    except UserError as error:
        return str(error)
    return "no error"


def test_too_few_vectors_fail_every_rank() -> None:
    message = "5 samples do not have 5 neighbours each; lower k to 4 at most"
    assert run_ranks(refusal, 2, 5) == [message] * 2
    assert run_ranks(refusal, 2, 4) == ["no error"] * 2
