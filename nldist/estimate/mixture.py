"""Two Gaussians on the losses of the whole data set, fitted by all ranks together.

The semantics are those of scikit-learn's `GaussianMixture(n_components=2, max_iter=10, tol=1e-2,
reg_covar=5e-4)`, which DivideMix and its successors call, early stop included (DivideMix, section 3.1;
docs/dividemix.md). What crosses ranks are sums over samples that have no order (nldist.estimate.sums). Parameters are
bit for bit the same for any number of ranks and any partition of the samples (given machines whose `exp` and `log`
round alike).
"""

import logging
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from nldist.dist.world import World
from nldist.estimate.sums import Sums, blocks, extremes

log = logging.getLogger(__name__)

# An effective number of samples below which a component's mean is rounding noise.
_MIN_COUNT = 1e-3
_MAX_KMEANS_STEPS = 300


@dataclass(frozen=True, eq=False)
class Mixture:
    """Two weighted Gaussians; component 0 is the one with the smaller mean (the clean samples).

    Attributes:
        means, variances, weights: float64 (2,).
        num_iterations: EM iterations made (scikit-learn's `n_iter_`).
        converged: whether the log-likelihood changed by less than `tol` in the last of them.
    """

    means: np.ndarray
    variances: np.ndarray
    weights: np.ndarray
    num_iterations: int
    converged: bool

    def clean_probability(self, values: np.ndarray) -> np.ndarray:
        """Posterior of component 0, float64 (n,), for `values` (n,); each depends on its own value alone."""
        return np.concatenate([_expectation(block, self)[0][:size] for block, size in blocks(values)])


def normalise(values: np.ndarray, world: World) -> np.ndarray:
    """Min-max normalise the losses of the whole set (DivideMix, section 3.1). A collective.

    Args:
        values: this rank's losses (n_own,); ranks own consecutive ids.
        world: the ranks; some may own nothing.

    Returns:
        float64 (n_own,) in [0, 1]; zeros if all losses are the same.

    Raises:
        FloatingPointError: on every rank, if any rank has a NaN or an infinity.
    """
    _refuse_non_finite(values, world)
    low, high = extremes(values, world)
    spread = high - low
    if not spread > 0:
        return np.zeros(len(values))
    return np.asarray((values.astype(np.float64) - low) / spread)


def history_mean(history: np.ndarray) -> np.ndarray:
    """Mean of each sample's remembered losses, which replaces the last loss at 90 % noise (docs/dividemix.md).

    Args:
        history: (n_own, h) normalised losses of the last h epochs in any order, NaN where there is none yet.

    Returns:
        float64 (n_own,); NaN for a sample without any loss, which `normalise` refuses.
    """
    total, count = np.zeros(len(history)), np.zeros(len(history))
    for column in history.T:
        seen = ~np.isnan(column)
        total += np.where(seen, column, 0.0)
        count += seen
    mean = np.full(len(history), np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return mean


def fit(
    values: np.ndarray, world: World, *, max_iter: int = 10, tol: float = 1e-2, reg_covar: float = 5e-4
) -> Mixture | None:
    """Fit two Gaussians by EM (docs/dividemix.md). A collective.

    The start is a 2-means partition grown from (min, max). The early stop is part of the method: EM run to
    convergence moves thousands of CIFAR-10's samples across the threshold.

    Args:
        values: this rank's normalised losses (n_own,), in [0, 1]; may be empty.
        world: the ranks.
        max_iter: EM iterations at most, at least 1.
        tol: stop when the mean log-likelihood of a sample changes by less than this.
        reg_covar: added to both variances, above 0.

    Returns:
        The mixture, the same on every rank; or None, logged, where no split can be made: fewer than two
        samples, all values the same, a component without samples, or two components with one mean.

    Raises:
        ValueError: on every rank, if any rank has a value outside [0, 1], or an argument is out of range.
    """
    if max_iter < 1 or not reg_covar > 0:
        raise ValueError(f"max_iter must be at least 1 and reg_covar above 0, not {max_iter} and {reg_covar}")
    sums = Sums(values, world)
    mixture = _maximise(_two_means(sums), sums.total, reg_covar)
    likelihood = -math.inf
    for iteration in range(1, max_iter + 1):
        if mixture is None:
            break
        limit = _likelihood_limit(reg_covar)
        *clean, scaled = sums.add(partial(_expected_moments, mixture=mixture, limit=limit))
        previous, likelihood = likelihood, scaled * limit / sums.total[0]
        converged = abs(likelihood - previous) < tol
        mixture = _maximise(clean, sums.total, reg_covar, iteration, converged)
        if converged:
            break
    if mixture is None and world.is_main:
        log.warning(
            "no clean/noisy split can be made of %d losses: all are the same or a component has no samples",
            sums.total[0],
        )
    return _ordered(mixture) if mixture else None


def _refuse_non_finite(values: np.ndarray, world: World) -> None:
    bad = np.flatnonzero(~np.isfinite(values))
    first, last = (int(bad[0]), int(bad[-1])) if len(bad) else (0, 0)
    facts = world.all_gather(np.array([[len(values), len(bad), first, last]], np.int64))
    if not facts[:, 1].any():
        return
    starts = np.cumsum(facts[:, 0]) - facts[:, 0]
    where = "; ".join(
        f"rank {rank}: {num_bad} of ids {start + first} to {start + last}"
        for rank, (start, (_, num_bad, first, last)) in enumerate(zip(starts, facts, strict=True))
        if num_bad
    )
    raise FloatingPointError(f"{facts[:, 1].sum()} of {facts[:, 0].sum()} losses are NaN or infinite ({where})")


def _moments_below(x: np.ndarray, threshold: float) -> tuple[np.ndarray, ...]:
    below = (x <= threshold).astype(np.float64)
    first = below * x
    return below, first, first * x


def _expected_moments(x: np.ndarray, mixture: Mixture, limit: float) -> tuple[np.ndarray, ...]:
    clean, likelihood = _expectation(x, mixture)
    first = clean * x
    return clean, first, first * x, likelihood / limit


def _expectation(x: np.ndarray, mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """Posterior of component 0 and log-likelihood of each value (b,)."""
    constants = np.log(mixture.weights) - 0.5 * np.log(2 * np.pi * mixture.variances)
    first, second = (
        constant - (x - mean) ** 2 * (0.5 / variance)
        for constant, mean, variance in zip(constants, mixture.means, mixture.variances, strict=True)
    )
    gap = second - first
    ratio = np.exp(-np.abs(gap))
    evidence = 1.0 + ratio
    return np.where(gap <= 0, 1.0, ratio) / evidence, np.maximum(first, second) + np.log(evidence)


def _likelihood_limit(reg_covar: float) -> float:
    """Bound of |log-likelihood| in [0, 1]: a weight is at least 1/2, variances at most 1/4 + `reg_covar`."""
    return 0.5 / reg_covar + 0.5 * math.log(2 * math.pi * (0.25 + reg_covar)) + 1.0


def _two_means(sums: Sums) -> list[float]:
    """Moments of the lower cluster of 2-means run from (min, max) to its fixed point (docs/dividemix.md)."""
    centres = sums.low, sums.high
    lower: list[float] = []
    for _ in range(_MAX_KMEANS_STEPS):
        previous, threshold = lower, (centres[0] + centres[1]) / 2
        lower = sums.add(partial(_moments_below, threshold=threshold))
        num_lower, num_upper = lower[0], sums.total[0] - lower[0]
        if lower == previous or not (num_lower and num_upper):
            break
        centres = lower[1] / num_lower, (sums.total[1] - lower[1]) / num_upper
    return lower


def _maximise(
    first: list[float], total: list[float], reg_covar: float, num_iterations: int = 0, converged: bool = False
) -> Mixture | None:
    """M-step from the moments of component 0 and of all samples; None if a component has no samples."""
    counts, sums, squares = (np.array([one, whole - one]) for one, whole in zip(first, total, strict=True))
    if counts.min() < _MIN_COUNT:
        return None
    means = sums / counts
    if means[0] == means[1]:
        return None
    variances = np.maximum(squares / counts - means**2, 0.0) + reg_covar
    return Mixture(means, variances, counts / total[0], num_iterations, converged)


def _ordered(mixture: Mixture) -> Mixture:
    """The mixture with the smaller mean first."""
    order = np.argsort(mixture.means)
    means, variances, weights = (a[order] for a in (mixture.means, mixture.variances, mixture.weights))
    return replace(mixture, means=means, variances=variances, weights=weights)
