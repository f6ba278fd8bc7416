"""From a sweep's losses to clean and noisy: normalise, average over epochs, fit; and how good the division is."""

import logging
from typing import Any

import numpy as np

from nldist.config import MixtureSection
from nldist.dist.world import World
from nldist.estimate.mixture import Mixture, fit, history_mean, normalise

log = logging.getLogger(__name__)


def divide(
    losses: np.ndarray, history: np.ndarray | None, settings: MixtureSection, world: World
) -> tuple[np.ndarray, Mixture | None]:
    """Fit the mixture on the losses of all ranks (DivideMix, section 3.1). A collective.

    Args:
        losses: (owned,) this rank's losses, NaN where a sample was not seen.
        history: (owned, h) normalised losses of earlier epochs, newest first, NaN = none; updated in place.
        settings: the mixture's settings.
        world: the ranks.

    Returns:
        What the mixture was fitted on, (owned,) in [0, 1] with NaN where not seen, and the mixture, or None
        where no division can be made.

    Raises:
        FloatingPointError: a seen sample's loss is not finite, on any rank.
    """
    seen = ~np.isnan(losses)
    values = np.full(len(losses), np.nan)
    values[seen] = normalise(losses[seen], world)
    if history is not None:
        history[:, 1:] = history[:, :-1].copy()
        history[:, 0] = values
        values = np.where(seen, history_mean(history), np.nan)
    mixture = fit(values[seen], world, max_iter=settings.max_iter, tol=settings.tol, reg_covar=settings.reg_covar)
    if mixture is None:
        log.warning("the losses do not divide into two groups; the previous division stays")
    return values, mixture


def split_quality(clean_probability: np.ndarray, truth: np.ndarray | None, tau: float) -> dict[str, Any]:
    """Size of the labelled part and, where the truth is known, how well it finds the correct labels.

    Args:
        clean_probability: (N,), NaN where a sample was not seen.
        truth: (N,) bool, whether the label is correct; None if unknown.
        tau: the threshold of the labelled part.

    Returns:
        labelled_share; with truth also split_auc, split_precision and split_recall (None where undefined).
    """
    seen = ~np.isnan(clean_probability)
    chosen = clean_probability[seen] > tau
    quality: dict[str, Any] = {"labelled_share": float(chosen.mean())}
    if truth is None:
        return quality
    correct = truth[seen]
    hits = int((chosen & correct).sum())
    both = 0 < correct.sum() < len(correct)
    return quality | {
        "split_auc": _roc_auc(clean_probability[seen], correct) if both else None,
        "split_precision": hits / int(chosen.sum()) if chosen.any() else None,
        "split_recall": hits / int(correct.sum()) if correct.any() else None,
    }


def _roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive's score is above a negative's (Hanley and McNeil 1982), ties half.

    As scikit-learn's, which takes seconds to import.
    """
    _, place = np.unique(scores, return_inverse=True)
    positives, negatives = (np.bincount(place[chosen], minlength=place.max() + 1) for chosen in (positive, ~positive))
    below = np.cumsum(negatives) - negatives
    return float((positives * (2 * below + negatives)).sum() / (2 * positives.sum() * negatives.sum()))
