import numpy as np
import pytest

from nldist.dist.world import World
from nldist.estimate.mixture import fit, normalise
from tests.ranks import run_ranks

NUM_SAMPLES = 40_003
SHARES: dict[int, list[float]] = {
    1: [0, 1],
    2: [0, 0.001, 1],
    3: [0, 0.4, 0.4, 1],
    4: [0, 0.13, 0.13, 0.7, 1],
}


def raw_losses() -> np.ndarray:
    random = np.random.default_rng(3)
    noisy = random.random(NUM_SAMPLES) < 0.6
    losses = np.where(noisy, random.gamma(6, 0.6, NUM_SAMPLES), random.exponential(0.4, NUM_SAMPLES))
    return losses.astype(np.float32)


def own_part(world: World, values: np.ndarray) -> np.ndarray:
    bounds = [int(share * len(values)) for share in SHARES[world.size]]
    return values[bounds[world.rank] : bounds[world.rank + 1]]


def split(world: World, seed: int | None) -> tuple:
    losses = raw_losses()
    if seed is not None:
        losses = np.random.default_rng(seed).permutation(losses)
    values = normalise(own_part(world, losses), world)
    mixture = fit(values, world)
    assert mixture is not None
    parameters = np.stack([mixture.means, mixture.variances, mixture.weights])
    return parameters, mixture.num_iterations, values, mixture.clean_probability(values)


def outcome(world: World, values: np.ndarray, function: str) -> str:
    """How a collective ended on this rank; the ranks must end alike, and a hang fails the test."""
    try:
        own = own_part(world, values)
        return repr(fit(own, world) if function == "fit" else normalise(own, world))
    except (FloatingPointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_same_bits_for_any_partition(world_size: int) -> None:
    expected, num_iterations, values, probability = split(World.single(), None)
    ranks = run_ranks(split, world_size, None)
    for parameters, iterations, _, _ in ranks:
        np.testing.assert_array_equal(parameters, expected)
        assert iterations == num_iterations
    np.testing.assert_array_equal(np.concatenate([r[2] for r in ranks]), values)
    np.testing.assert_array_equal(np.concatenate([r[3] for r in ranks]), probability)
    for parameters, *_ in run_ranks(split, world_size, 17):
        np.testing.assert_array_equal(parameters, expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_loss_that_is_not_finite_fails_every_rank(world_size: int) -> None:
    values = np.ones(100)
    values[[80, 90]] = np.nan, np.inf
    first, *rest = run_ranks(outcome, world_size, values, "normalise")
    assert first.startswith("FloatingPointError: 2 of 100")
    assert f"rank {world_size - 1}: 2 of ids 80 to 90" in first
    assert all(other == first for other in rest)


def test_a_value_out_of_range_fails_every_rank() -> None:
    values = np.linspace(0, 1, 100)
    values[95] = 1.01
    first, *rest = run_ranks(outcome, 3, values, "fit")
    assert first == "ValueError: 1 of 100 losses lie outside [0, 1]: normalise them first"
    assert all(other == first for other in rest)


@pytest.mark.parametrize("num_samples", [0, 1, 100])
def test_no_split_on_any_rank(num_samples: int) -> None:
    assert run_ranks(outcome, 4, np.zeros(num_samples), "fit") == ["None"] * 4


def test_samples_on_one_rank_only() -> None:
    first, *rest = run_ranks(outcome, 2, np.array([0.0, 0.1, 0.9, 1.0]), "fit")
    assert first.startswith("Mixture(")
    assert rest == [first]
