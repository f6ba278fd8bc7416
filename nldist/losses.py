"""Losses and label operations that several methods share. Logits and probabilities are (b, C)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nldist.dist.world import World


def soft_cross_entropy(logits: Float[Tensor, "b C"], targets: Float[Tensor, "b C"]) -> Float[Tensor, ""]:
    """Mean over the rows of -sum_c t_c log p_c, for soft targets (b, C)."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()


def negative_entropy(logits: Float[Tensor, "b C"]) -> Float[Tensor, ""]:
    """Mean over the rows of sum_c p_c log p_c (DivideMix, the confidence penalty of its section 3.1)."""
    log_p = F.log_softmax(logits, dim=1)
    return (log_p.exp() * log_p).sum(1).mean()


def class_mean_squared_error(probabilities: Float[Tensor, "b C"], targets: Float[Tensor, "b C"]) -> Float[Tensor, ""]:
    """Mean over rows and classes of (p_c - t_c)^2: the unlabelled loss of MixMatch, equation 4, as DivideMix's code."""
    return (probabilities - targets).square().mean()


def prior_penalty(probabilities: Float[Tensor, "b C"], world: World) -> Float[Tensor, ""]:
    """KL divergence from a uniform prior to the global mean prediction: sum_c pi_c log(pi_c / pbar_c), pi_c = 1/C.

    DivideMix, equation 11. `pbar` is the mean over the global batch; the gradient is that of the concatenated batch.
    """
    prior = 1 / probabilities.shape[1]
    local, mean = _mean_prediction(probabilities, world, torch.finfo(probabilities.dtype).tiny)
    return _with_gradient((prior * (prior / mean).log()).sum(), -prior / mean, local)


def mean_negative_entropy(probabilities: Float[Tensor, "b C"], world: World) -> Float[Tensor, ""]:
    """Negative entropy of the global mean prediction: sum_c pbar_c log pbar_c.

    The entropy term of SCAN and ScanMix (docs/scanmix.md). `pbar` is the mean over the global batch, at least 1e-8;
    the gradient is that of the concatenated batch.
    """
    local, mean = _mean_prediction(probabilities, world, 1e-8)
    return _with_gradient((mean * mean.log()).sum(), mean.log() + 1, local)


def agreement(
    anchor_log_p: Float[Tensor, "*pairs C"], neighbour_log_p: Float[Tensor, "*pairs C"]
) -> Float[Tensor, "*pairs"]:
    """log(p(a) . p(n)) of pairs, at least -100 (docs/scanmix.md): (...) from log probabilities (..., C) of both."""
    return (anchor_log_p + neighbour_log_p).logsumexp(-1).clamp_min(-100)


def _mean_prediction(
    probabilities: Float[Tensor, "b C"], world: World, least: float
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """This rank's part of the global mean prediction, scaled so that its mean over the ranks is that; and the mean.

    Ranks may have different numbers of rows. The mean (C,) has no gradient and is at least `least`.
    """
    total = torch.cat([probabilities.detach().sum(0), probabilities.new_full((1,), len(probabilities))])
    total = world.all_reduce(total)
    num_rows = total[-1]
    return probabilities.sum(0) * (world.size / num_rows), (total[:-1] / num_rows).clamp_min(least)


def _with_gradient(
    value: Float[Tensor, ""], slope: Float[Tensor, " C"], local_mean: Float[Tensor, " C"]
) -> Float[Tensor, ""]:
    """`value`, with the gradient slope . d local_mean: under DDP's averaging the exact one (docs/dividemix.md)."""
    surrogate = (slope * local_mean).sum()
    return surrogate + (value - surrogate).detach()


def sharpen(probabilities: Float[Tensor, "b C"], temperature: float) -> Float[Tensor, "b C"]:
    """p_c^(1/T) / sum_c' p_c'^(1/T) (DivideMix, equation 4)."""
    return (probabilities.log() / temperature).softmax(1)  # as powers, small T would underflow to 0/0


def mix(
    values: Float[Tensor, " b *row"], permutation: Int[Tensor, " b"], weight: float, num_rows: int
) -> Float[Tensor, " {num_rows} *row"]:
    """Rows weight * v_i + (1 - weight) * v_permutation(i), for the first `num_rows` rows (mixup, equation 1)."""
    return torch.lerp(values[permutation[:num_rows]], values[:num_rows], weight)


def one_hot(labels: Int[Tensor, " b"], num_classes: int) -> Float[Tensor, "b {num_classes}"]:
    """Labels (b,) as float32 rows (b, C)."""
    return F.one_hot(labels, num_classes).float()
