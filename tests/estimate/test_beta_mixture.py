from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from nldist.dist.world import World
from nldist.estimate.beta_mixture import BetaMixture, fit_beta
from tests.ranks import run_ranks

Parameters = tuple[np.ndarray, np.ndarray, np.ndarray, float, float]


def losses_of(num_clean: int, num_noisy: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    parts = 4 * rng.beta(1.2, 8, num_clean), 4 * rng.beta(6, 3, num_noisy)
    return rng.permutation(np.concatenate(parts)).astype(np.float32)


def reference(losses: np.ndarray, num_iterations: int) -> Parameters:
    """EM with the method of moments, as the paper's section 3.1 describes it (our own, on scipy's densities)."""
    low, high = np.percentile(losses.astype(np.float64), [5, 95])
    kept = losses[(losses >= low) & (losses <= high)].astype(np.float64)
    x = ((kept - low - 1e-5) / (high - low - 1e-5 + 1e-6)).clip(1e-3, 1 - 1e-3)
    alphas, betas, weights = np.array([1.0, 2.0]), np.array([2.0, 1.0]), np.array([0.5, 0.5])
    for _ in range(num_iterations):
        densities = np.array([weights[k] * stats.beta.pdf(x, alphas[k], betas[k]) for k in (0, 1)]).clip(1e-12)
        shares = densities / densities.sum(0)
        for k in (0, 1):
            mean = np.average(x, weights=shares[k])
            variance = np.average((x - mean) ** 2, weights=shares[k])
            alphas[k] = mean * (mean * (1 - mean) / variance - 1)
            betas[k] = alphas[k] * (1 - mean) / mean
        weights = shares.mean(1)
    return alphas, betas, weights, low, high


def fitted(world: World, losses: np.ndarray, bounds: list[int]) -> tuple[Any, np.ndarray]:
    mine = losses[bounds[world.rank] : bounds[world.rank + 1]]
    mixture = fit_beta(mine, world)
    assert mixture is not None
    return mixture.state_dict(), mixture.noisy_probability(torch.from_numpy(mine)).numpy()


def test_the_fit_is_that_of_the_equations() -> None:
    losses = losses_of(3000, 2000)
    state, noisy = fitted(World.single(), losses, [0, 5000])
    alphas, betas, weights, low, high = reference(losses, 10)
    for name, value in (("alphas", alphas), ("betas", betas), ("weights", weights), ("low", low), ("high", high)):
        np.testing.assert_allclose(state[name], value, rtol=1e-5)
    x = ((losses - low - 1e-5) / (high - low - 1e-5 + 1e-6)).clip(1e-3, 1 - 1e-3)
    densities = [weights[k] * stats.beta.pdf(x, alphas[k], betas[k]) for k in (0, 1)]
    expected = (densities[1] / (densities[0] + densities[1])).clip(1e-4, 1 - 1e-4)
    rising = losses < losses[expected.argmax()]
    np.testing.assert_allclose(noisy[rising], expected[rising], atol=2e-4)
    assert (noisy[~rising] >= expected[rising].max() - 1e-3).all(), "a larger loss is not cleaner"


def test_it_is_bit_for_bit_the_same_on_any_number_of_ranks() -> None:
    losses = losses_of(700, 400)
    alone, noisy = fitted(World.single(), losses, [0, 1100])
    for bounds in ([0, 367, 1100], [0, 0, 1100], [0, 300, 301, 1100]):
        results = run_ranks(fitted, len(bounds) - 1, losses, bounds)
        for state, _ in results:
            assert state == alone
        np.testing.assert_allclose(np.concatenate([part for _, part in results]), noisy, rtol=1e-6)


def test_the_posterior_stays_at_its_largest() -> None:
    """Where the clean component has the wider tail the posterior would fall again towards the largest losses."""
    mixture = BetaMixture(np.array([1.0, 30.0]), np.array([1.0, 20.0]), np.array([0.5, 0.5]), 0.0, 1.0)
    noisy = mixture.noisy_probability(torch.linspace(0, 2, 101, dtype=torch.float64))
    assert (noisy.diff() >= 0).all()
    assert noisy[0] == pytest.approx(1e-4)
    assert noisy[50] > 0.8


@pytest.mark.parametrize("losses", [np.full(50, 0.7), np.zeros(9), np.ones(2)])
def test_losses_that_are_all_the_same_give_no_mixture(losses: np.ndarray) -> None:
    assert fit_beta(losses.astype(np.float32), World.single()) is None
