import logging

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.mixture import GaussianMixture

from nldist.dist.world import World
from nldist.estimate.mixture import Mixture, fit, history_mean, normalise

WORLD = World.single()
NUM_SEEDS = 4
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def reference(values: np.ndarray, **settings: object) -> tuple[GaussianMixture, np.ndarray]:
    """The fit of the published methods, and its probability of being clean."""
    model = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, **settings).fit(values[:, None])
    return model, model.predict_proba(values[:, None])[:, model.means_.argmin()]


def synthetic_losses(noise_rate: float, shape: str, num_samples: int = 50_000) -> np.ndarray:
    """Cross-entropy after warm-up: clean samples near zero with a tail, noisy ones far out or not far out."""
    random = np.random.default_rng([int(100 * noise_rate), len(shape)])
    noisy = random.random(num_samples) < noise_rate
    if shape == "separate":
        clean_losses, noisy_losses = random.exponential(0.4, num_samples), random.normal(4, 1.2, num_samples)
    else:
        clean_losses, noisy_losses = 3 * random.beta(0.5, 3, num_samples), random.gamma(6, 0.6, num_samples)
    losses = np.where(noisy, np.abs(noisy_losses), clean_losses).astype(np.float32)
    return normalise(losses, WORLD)


def digits_losses(noise_rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of a linear classifier after a few epochs on noisy digits; which labels are wrong."""
    images, truth = load_digits(return_X_y=True)
    random = np.random.default_rng(5)
    labels = np.where(random.random(len(truth)) < noise_rate, random.integers(0, 10, len(truth)), truth)
    model = SGDClassifier(loss="log_loss", alpha=1e-3, max_iter=4, tol=None, random_state=0)
    probabilities = model.fit(images / 16, labels).predict_proba(images / 16)
    losses = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-6))
    return normalise(losses, WORLD), labels != truth


def assert_agrees(values: np.ndarray) -> None:
    """Ours is as near to scikit-learn's fit as that is to itself with another seed, or within 0.5 %."""
    mixture = fit(values, WORLD)
    assert mixture is not None
    ours = mixture.clean_probability(values)
    models, theirs = zip(*(reference(values, random_state=seed) for seed in range(NUM_SEEDS)), strict=True)
    splits = [p > 0.5 for p in theirs]
    spread = max(int(np.count_nonzero(a != b)) for a in splits for b in splits)
    for model, split in zip(models, splits, strict=True):
        np.testing.assert_allclose(mixture.means, np.sort(model.means_.ravel()), atol=0.01)
        assert np.count_nonzero((ours > 0.5) != split) <= max(spread, len(values) // 200)


@pytest.mark.parametrize("shape", ["separate", "overlapping"])
@pytest.mark.parametrize("noise_rate", [0.2, 0.5, 0.8, 0.9])
def test_agrees_with_scikit_learn(noise_rate: float, shape: str) -> None:
    assert_agrees(synthetic_losses(noise_rate, shape))


@pytest.mark.parametrize("noise_rate", [0.2, 0.5, 0.8])
def test_agrees_with_scikit_learn_on_losses_of_a_real_model(noise_rate: float) -> None:
    values, noisy = digits_losses(noise_rate)
    assert_agrees(values)
    mixture = fit(values, WORLD)
    assert mixture is not None
    clean = mixture.clean_probability(values) > 0.5
    assert np.mean(noisy[clean]) < np.mean(noisy) < np.mean(noisy[~clean])


@pytest.mark.parametrize("max_iter", [1, 3, 10, 100])
@pytest.mark.parametrize("noise_rate", [0.2, 0.5, 0.9])
def test_equals_scikit_learn_from_the_same_start(noise_rate: float, max_iter: int) -> None:
    values = synthetic_losses(noise_rate, "overlapping", 20_000)
    upper, threshold = np.zeros(len(values), bool), 0.5
    while not np.array_equal(upper, values > threshold):
        upper = values > threshold
        threshold = (values[upper].mean() + values[~upper].mean()) / 2
    clusters = values[~upper], values[upper]
    start = GaussianMixture(
        2,
        max_iter=max_iter,
        tol=1e-2,
        reg_covar=5e-4,
        weights_init=np.array([len(c) for c in clusters]) / len(values),
        means_init=np.array([[c.mean()] for c in clusters]),
        precisions_init=np.array([[[1 / (c.var() + 5e-4)]] for c in clusters]),
    ).fit(values[:, None])
    mixture = fit(values, WORLD, max_iter=max_iter)
    assert mixture is not None
    assert (mixture.num_iterations, mixture.converged) == (start.n_iter_, start.converged_)
    np.testing.assert_allclose(mixture.means, start.means_.ravel(), atol=1e-8)
    np.testing.assert_allclose(mixture.variances, start.covariances_.ravel(), atol=1e-8)
    np.testing.assert_allclose(mixture.weights, start.weights_, atol=1e-8)
    theirs = start.predict_proba(values[:, None])[:, 0]
    np.testing.assert_allclose(mixture.clean_probability(values), theirs, atol=1e-5)


def test_order_of_the_samples_does_not_change_a_bit() -> None:
    values = synthetic_losses(0.5, "overlapping", 40_001)
    expected = fit(values, WORLD)
    assert expected is not None
    probability = expected.clean_probability(values)
    random = np.random.default_rng(0)
    for _ in range(5):
        order = random.permutation(len(values))
        mixture = fit(values[order], WORLD)
        assert mixture is not None
        for name in ("means", "variances", "weights"):
            np.testing.assert_array_equal(getattr(mixture, name), getattr(expected, name))
        cut = random.integers(1, len(values))
        parts = [mixture.clean_probability(values[:cut]), mixture.clean_probability(values[cut:])]
        np.testing.assert_array_equal(np.concatenate(parts), probability)


def test_single_precision_and_strided_values_are_taken() -> None:
    values = synthetic_losses(0.5, "separate", 30_000).astype(np.float32)
    wide = np.stack([values, values], axis=1)
    one, other = fit(values, WORLD), fit(wide[:, 1], WORLD)
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one.means, other.means)
    np.testing.assert_array_equal(one.clean_probability(values), one.clean_probability(wide[:, 1]))


@pytest.mark.parametrize("values", [[], [0.3], [0.0] * 10, [0.7] * 10, [0.5, 0.5 + 1e-15]])
def test_no_split_of_equal_or_too_few_values(values: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert fit(np.array(values), WORLD) is None
    assert "no clean/noisy split" in caplog.text


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0] * 99 + [1.0], [0.0, 1e-3, 2e-3, 1.0]])
def test_few_values_make_a_split(values: list[float]) -> None:
    mixture = fit(np.array(values), WORLD)
    assert mixture is not None
    assert np.all(mixture.variances >= 5e-4 * (1 - 1e-9))
    assert mixture.weights.sum() == pytest.approx(1)
    probability = mixture.clean_probability(np.array(values))
    np.testing.assert_array_equal(probability > 0.5, np.array(values) < 0.5)


def test_the_smaller_mean_is_clean_whatever_the_weights() -> None:
    mixture = Mixture(np.array([0.1, 0.6]), np.array([0.01, 0.02]), np.array([0.1, 0.9]), 1, True)
    probability = mixture.clean_probability(np.array([0.1, 0.6, -40.0, 50.0]))
    assert probability[0] > 0.5 > probability[1]
    assert np.isfinite(probability).all()


@pytest.mark.parametrize("value", [-0.1, 1.5, np.nan])
def test_fit_refuses_values_that_are_not_normalised(value: float) -> None:
    with pytest.raises(ValueError, match=r"1 of 3 losses lie outside \[0, 1\]"):
        fit(np.array([0.2, value, 0.4]), WORLD)


@pytest.mark.parametrize("settings", [{"max_iter": 0}, {"reg_covar": 0.0}])
def test_fit_refuses_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(ValueError, match="max_iter must be"):
        fit(np.array([0.2, 0.4]), WORLD, **settings)


def test_normalise() -> None:
    np.testing.assert_array_equal(normalise(np.array([2.0, 6.0, 3.0]), WORLD), [0, 1, 0.25])
    np.testing.assert_array_equal(normalise(np.full(3, 1.7, np.float32), WORLD), np.zeros(3))
    assert normalise(np.empty(0, np.float32), WORLD).shape == (0,)
    random = np.random.default_rng(0).random(1000).astype(np.float32)
    assert normalise(random, WORLD).dtype == np.float64


def test_normalise_says_which_losses_are_not_finite() -> None:
    with pytest.raises(FloatingPointError, match=r"2 of 5 losses .*rank 0: 2 of ids 1 to 4"):
        normalise(np.array([1, np.nan, 2, 3, -np.inf]), WORLD)


def test_history_mean() -> None:
    nan = np.nan
    history = np.array([[1, 2, 3], [nan, 2, 4], [5, nan, nan], [nan, nan, nan]])
    np.testing.assert_array_equal(history_mean(history), [2, 3, 5, nan])


def test_the_early_stop_matters_for_these_losses() -> None:
    values = synthetic_losses(0.9, "overlapping")
    _, early = reference(values, random_state=0)
    model = GaussianMixture(2, max_iter=100, tol=1e-9, reg_covar=5e-4, random_state=0).fit(values[:, None])
    full = model.predict_proba(values[:, None])[:, model.means_.argmin()]
    assert np.count_nonzero((early > 0.5) != (full > 0.5)) > 0.005 * len(values)
