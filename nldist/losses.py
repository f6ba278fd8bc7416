"""Losses and label operations that several methods share. Logits and probabilities are (b, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.dist.world import World


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the rows of -sum_c t_c log p_c, for soft targets (b, C)."""
    return -(targets * F.log_softmax(logits, dim=1)).sum(1).mean()


def negative_entropy(logits: Tensor) -> Tensor:
    """Mean over the rows of sum_c p_c log p_c (DivideMix, the confidence penalty of its section 3.1)."""
    log_p = F.log_softmax(logits, dim=1)
    return (log_p.exp() * log_p).sum(1).mean()


def class_mean_squared_error(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows and classes of (p_c - t_c)^2: the unlabelled loss of MixMatch, equation 4, as DivideMix's code."""
    return (probabilities - targets).square().mean()


def prior_penalty(probabilities: Tensor, world: World) -> Tensor:
    """KL divergence from a uniform prior to the global mean prediction: sum_c pi_c log(pi_c / pbar_c), pi_c = 1/C.

    DivideMix, equation 11. `pbar` is the mean over the global batch. The value is exact; the gradient is that
    of the concatenated batch under DDP's averaging, by the surrogate of algorithms 1.6.
    """
    prior = 1 / probabilities.shape[1]
    local_mean = probabilities.mean(0)
    global_mean = world.all_reduce(local_mean.detach().clone()) / world.size
    global_mean = global_mean.clamp_min(torch.finfo(global_mean.dtype).tiny)
    value = (prior * (prior / global_mean).log()).sum()
    surrogate = (-(prior / global_mean) * local_mean).sum()
    return surrogate + (value - surrogate).detach()


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p_c^(1/T) / sum_c' p_c'^(1/T) (DivideMix, equation 4)."""
    return (probabilities.log() / temperature).softmax(1)  # as powers, small T would underflow to 0/0


def mix(values: Tensor, permutation: Tensor, weight: float, num_rows: int) -> Tensor:
    """Rows weight * v_i + (1 - weight) * v_permutation(i), for the first `num_rows` rows (mixup, equation 1)."""
    return torch.lerp(values[permutation[:num_rows]], values[:num_rows], weight)
