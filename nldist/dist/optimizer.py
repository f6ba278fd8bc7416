"""The configured optimiser, and its learning rate over epochs and batch sizes."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nldist.config import OptimSection


def batch_factor(optim: OptimSection, global_batch: int) -> float:
    """How many times the configured learning rate a global batch of this many samples gets, once warmed up.

    The linear rule is Goyal et al.'s (arXiv 1706.02677, section 2.1), the root one Krizhevsky's (arXiv 1404.5997).
    """
    if optim.lr_batch is None or optim.lr_rule == "none":
        return 1.0
    ratio = global_batch / optim.lr_batch
    return ratio if optim.lr_rule == "linear" else math.sqrt(ratio)


def learning_rate(optim: OptimSection, epoch: float, num_epochs: int, factor: float = 1.0) -> float:
    """The learning rate at a (fractional) epoch of `num_epochs`, for a batch with this `batch_factor`.

    A factor above 1 is grown into over lr_rule_epochs (Goyal et al., section 2.2: gradual warm-up). Schedules go by
    whole epochs (as in the codes of SimCLR's and MoCo's authors, too); what grows at the start goes by steps. A cosine
    may restart (SGDR, arXiv 1608.03983, equation 5 with T_mult = 1).
    """
    if factor > 1 and epoch < optim.lr_rule_epochs:
        factor = 1 + (factor - 1) * epoch / optim.lr_rule_epochs
    rate = optim.lr * factor
    if optim.schedule == "cosine":
        period = optim.restart_epochs or num_epochs
        place = int(epoch) % period if optim.restart_epochs else int(epoch)
        rate = optim.min_lr + (rate - optim.min_lr) * (1 + math.cos(math.pi * place / period)) / 2
    elif optim.schedule == "linear":
        first = optim.milestones[0] if optim.milestones else 0
        past = max(0, int(epoch) - first) / max(num_epochs - first, 1)
        rate = optim.min_lr + (rate - optim.min_lr) * (1 - past)
    else:
        rate *= optim.gamma ** sum(epoch >= milestone for milestone in optim.milestones)
    return rate * min(1.0, epoch / optim.warmup_epochs) if optim.warmup_epochs else rate


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.Optimizer:
    """The configured optimiser over all parameters of `model`."""
    make: Callable[..., torch.optim.Optimizer]
    momentum: dict[str, Any] = {"momentum": optim.momentum, "nesterov": optim.nesterov}
    if optim.name in ("lars", "lamb"):
        import timm.optim

        make, options = (timm.optim.Lars, momentum) if optim.name == "lars" else (timm.optim.Lamb, {})
        return make(_layerwise(model, optim), lr=optim.lr, **options)
    kind, options = (torch.optim.SGD, momentum) if optim.name == "sgd" else (torch.optim.Adam, {})
    make = _eager(kind)
    return make(model.parameters(), lr=optim.lr, weight_decay=optim.weight_decay, **options)


@functools.cache
def _eager(kind: Any) -> Any:
    """An optimiser's class with its methods as they are, without what torch.compile needs around them.

    Which imports torch._dynamo and sympy when they are first called: seconds in each process. Only networks are
    compiled here.
    """
    names = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), methods | {"step": torch.no_grad()(inspect.unwrap(kind.step))})


def num_moments(optim: OptimSection) -> int:
    """Tensors of the weights' size that the configured optimiser keeps."""
    return 2 if optim.name in ("adam", "lamb") else int(optim.momentum > 0)


def _layerwise(model: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Groups for LARS and LAMB: biases and norms, whose size tells no good rate, neither decay nor adapt."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
