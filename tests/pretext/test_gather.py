import numpy as np
import pytest
import torch

from nldist.dist.rows import Exchange, gather_rows, global_mean, row_counts
from nldist.dist.world import World
from tests.ranks import run_ranks

COUNTS: dict[int, list[tuple[int, ...]]] = {
    1: [(5,)],
    2: [(3, 3), (2, 5), (0, 3)],
    3: [(4, 4, 4), (3, 1, 4), (1, 0, 0)],
}
CASES = [(size, counts) for size, cases in COUNTS.items() for counts in cases]


def part(rows: torch.Tensor, counts: tuple[int, ...], world: World) -> torch.Tensor:
    """This rank's rows."""
    return torch.split(rows, list(counts))[world.rank]


def all_rows(num_rows: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, *shape, dtype=torch.float64, generator=generator)


def gather_and_differentiate(world: World, counts: tuple[int, ...]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Rank r's loss is (r + 1) * sum of the cubes of all rows."""
    mine = part(all_rows(sum(counts), 2, 3), counts, world).clone().requires_grad_()
    gathered = gather_rows(mine, world)
    (gradient,) = torch.autograd.grad(((world.rank + 1) * gathered**3).sum(), mine)
    return row_counts(len(mine), world), gathered.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize(("size", "counts"), CASES)
def test_gathered_rows_and_the_sum_of_all_ranks_gradients(size: int, counts: tuple[int, ...]) -> None:
    rows = all_rows(sum(counts), 2, 3)
    expected = sum(range(1, size + 1)) * 3 * rows**2
    results = run_ranks(gather_and_differentiate, size, counts)
    for known, gathered, _ in results:
        assert known == list(counts)
        np.testing.assert_array_equal(gathered, rows)
    np.testing.assert_allclose(np.concatenate([gradient for _, _, gradient in results]), expected, rtol=1e-12)


def share_of_mean(world: World, counts: tuple[int, ...]) -> float:
    return float(global_mean(part(all_rows(sum(counts)), counts, world), counts, world))


@pytest.mark.parametrize(("size", "counts"), CASES)
def test_the_mean_of_the_shares_is_the_global_mean(size: int, counts: tuple[int, ...]) -> None:
    shares = run_ranks(share_of_mean, size, counts)
    assert np.mean(shares) == pytest.approx(float(all_rows(sum(counts)).mean()), rel=1e-12)


def exchanged(world: World, counts: tuple[int, ...], seed: int) -> tuple[np.ndarray, bool]:
    """Which rows this rank gets, named (rank, number); and whether they come back doubled in their first order."""
    mine = torch.stack([torch.full((counts[world.rank],), world.rank), torch.arange(counts[world.rank])], 1)
    exchange = Exchange(counts, world, np.random.default_rng([seed, world.rank]))
    received = exchange.shuffle(mine)
    return received.numpy(), torch.equal(exchange.restore(2 * received), 2 * mine)


@pytest.mark.parametrize(
    ("size", "counts"), [*CASES, (2, (40, 41)), (3, (30, 29, 30)), (3, (1, 1, 1)), (4, (2, 2, 2, 2))]
)
def test_an_exchange_gives_every_rank_equal_shares_and_comes_back(size: int, counts: tuple[int, ...]) -> None:
    results = run_ranks(exchanged, size, counts, 0)
    assert all(came_back for _, came_back in results)
    received = [rows.tolist() for rows, _ in results]
    assert sorted(row for rows in received for row in rows) == [
        [r, i] for r, count in enumerate(counts) for i in range(count)
    ]
    for rows in received:
        for rank, count in enumerate(counts):
            assert sum(row[0] == rank for row in rows) - count // size in (0, 1)
    if len(set(counts)) == 1:
        assert len({len(rows) for rows in received}) == 1, "ranks with the same number of rows keep it"


def test_each_exchange_is_drawn_anew() -> None:
    one, same, other = (run_ranks(exchanged, 2, (20, 20), seed) for seed in (0, 0, 1))
    for rank in range(2):
        assert one[rank][0].tolist() == same[rank][0].tolist()
        assert sorted(one[rank][0].tolist()) != sorted(other[rank][0].tolist())
