"""Two beta distributions on the losses of the whole data set, fitted by all ranks together.

Arazo et al., "Unsupervised Label Noise Modeling and Loss Correction", ICML 2019, section 3.1 (docs/baselines.md). What
crosses ranks are the losses once, for two percentiles, and sums over samples that have no order
(nldist.estimate.sums): parameters are the same for any number of ranks and any partition of the samples.
"""

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from nldist.dist.world import World
from nldist.estimate.sums import Sums

log = logging.getLogger(__name__)

# All from the authors' code.
_PERCENTILES = 5, 95  # losses beyond are outliers, left out of the fit
_EDGE = 1e-3  # scaled losses stay this far from 0 and 1, where the densities may be infinite
_LEAST_DENSITY = 1e-12
_SHIFT, _SPREAD = 1e-5, 1e-6
_CERTAIN = 1e-4  # no sample is more certain than this to be clean or noisy
# Ours: below these a component has no samples, or all of one value.
_MIN_COUNT, _MIN_VARIANCE = 1e-3, 1e-8


@dataclass(frozen=True, eq=False)
class BetaMixture:
    """Two weighted beta distributions of scaled losses; component 1, of the larger mean, is the noisy samples.

    Attributes:
        alphas, betas, weights: float64 (2,).
        low, high: the losses that are scaled to about 0 and 1.
    """

    alphas: np.ndarray
    betas: np.ndarray
    weights: np.ndarray
    low: float
    high: float

    def noisy_probability(self, losses: Tensor) -> Tensor:
        """Posterior of component 1 (b,) for losses (b,) on any device, at least 1e-4 away from 0 and 1.

        Beyond the loss at which it is largest it stays so: larger losses are not cleaner (authors' code).
        """
        values: Tensor = scaled(losses, self.low, self.high).clamp(_EDGE, 1 - _EDGE)
        slope_low, slope_high = (float(np.diff(p)[0]) for p in (self.alphas, self.betas))
        if slope_low > 0 and slope_high > 0:
            values = values.clamp_max(slope_low / (slope_low + slope_high))
        clean, noisy = (self._constant(k) for k in (0, 1))
        log_odds = noisy - clean + slope_low * values.log() + slope_high * (1 - values).log()
        return log_odds.sigmoid().clamp(_CERTAIN, 1 - _CERTAIN)

    def densities(self, x: np.ndarray) -> np.ndarray:
        """The components' weighted densities (2, b) at scaled losses (b,)."""
        x = x.clip(_EDGE, 1 - _EDGE)
        return np.stack(
            [
                np.exp(self._constant(k) + (self.alphas[k] - 1) * np.log(x) + (self.betas[k] - 1) * np.log(1 - x))
                for k in (0, 1)
            ]
        )

    def _constant(self, k: int) -> float:
        a, b = float(self.alphas[k]), float(self.betas[k])
        return math.log(self.weights[k]) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)

    def state_dict(self) -> dict[str, Any]:
        """Its parameters as plain values."""
        return {name: np.asarray(value).tolist() for name, value in vars(self).items()}

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "BetaMixture":
        """What gave `state_dict`."""
        arrays = {name: np.array(state[name]) for name in ("alphas", "betas", "weights")}
        return cls(**arrays, low=state["low"], high=state["high"])


def scaled(losses: Any, low: float, high: float) -> Any:
    """Losses so that `low` and `high` become about 0 and 1."""
    return (losses - (low + _SHIFT)) / (high - (low + _SHIFT) + _SPREAD)


def fit_beta(losses: np.ndarray, world: World, max_iter: int = 10) -> BetaMixture | None:
    """Fit two beta distributions by EM with the method of moments (section 3.1). A collective.

    Args:
        losses: this rank's, finite (n_own,); may be empty.
        world: the ranks.
        max_iter: EM iterations; there is no early stop.

    Returns:
        The mixture, the same on every rank; or None, logged, where no division can be made.
    """
    low, high = (float(p) for p in np.percentile(world.all_gather(losses.astype(np.float64)), _PERCENTILES))
    inside = losses[(losses >= low) & (losses <= high)].astype(np.float64)
    sums = Sums(scaled(inside, low, high).clip(_EDGE, 1 - _EDGE), world)
    halves = np.array([0.5, 0.5])
    mixture: BetaMixture | None = BetaMixture(np.array([1.0, 2.0]), np.array([2.0, 1.0]), halves, low, high)
    for _ in range(max_iter):
        if mixture is not None:
            mixture = _maximise(sums.add(partial(_expected_moments, mixture=mixture)), sums.total, low, high)
    if mixture is None and world.is_main:
        log.warning(
            "no beta mixture can be fitted to %d losses: a component has no samples, or one value", *sums.total[:1]
        )
    return mixture


def _expected_moments(x: np.ndarray, mixture: BetaMixture) -> tuple[np.ndarray, ...]:
    """E-step: component 0's share of each value, and its first and second moment."""
    clean, noisy = np.maximum(mixture.densities(x), _LEAST_DENSITY)
    share = clean / (clean + noisy)
    return share, share * x, share * x * x


def _maximise(first: list[float], total: list[float], low: float, high: float) -> BetaMixture | None:
    """M-step: each component's parameters from the mean and the variance of its shares of all values."""
    moments = np.array([first, np.subtract(total, first)])  # (2, 3)
    if moments[:, 0].min() < _MIN_COUNT:
        return None
    means, squares = moments[:, 1] / moments[:, 0], moments[:, 2] / moments[:, 0]
    variances = squares - means**2
    if variances.min() < _MIN_VARIANCE:
        return None
    alphas = means * (means * (1 - means) / variances - 1)
    order = np.argsort(means)
    betas, weights = alphas * (1 - means) / means, moments[:, 0] / total[0]
    return BetaMixture(alphas[order], betas[order], weights[order], low, high)
