"""Co-teaching (Han et al., NeurIPS 2018): docs/baselines.md."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.dist.engine import Engine
from nldist.dist.world import World
from nldist.passes.base import Pass
from nldist.passes.context import Context
from nldist.passes.joint import JointPass
from nldist.passes.method import Method, Phase
from nldist.passes.supervised import Step


class CoTeaching(Method):
    """Two networks; of each batch, each learns from the samples whose losses by the other one are small."""

    num_networks = 2

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.settings = context.config.method.co_teaching

    def phases(self) -> list[Phase]:
        """See Method."""
        return [Phase("train", self.context.recipe.epochs, self._passes)]

    def _passes(self, epoch: int) -> list[Pass]:
        return [JointPass(self.context, self.engines, epoch, self._loss)]

    def keep_rate(self, epoch: int) -> float:
        """R(T) = 1 - tau min(T^c / T_k, 1), after T epochs (Algorithm 1, line 8, and section 4's c)."""
        settings = self.settings
        return 1 - settings.forget_rate * min(float(epoch**settings.exponent) / settings.gradual_epochs, 1)

    def candidates(self, logits: Sequence[Tensor], epoch: int) -> Tensor:
        """Which samples of the batch may be selected, bool (b,): all."""
        return torch.ones(len(logits[0]), dtype=torch.bool, device=logits[0].device)

    def _loss(self, engines: Sequence[Engine], step: Step) -> Mapping[str, Tensor]:
        """Algorithm 1, lines 4 to 7."""
        logits = [engine.forward((step.images, "classify"))[0] for engine in engines]
        losses = [F.cross_entropy(each, step.labels, reduction="none") for each in logits]
        among, rate = self.candidates(logits, int(step.epoch)), self.keep_rate(int(step.epoch))
        chosen = [small_losses(each.detach(), rate, among) for each in losses]
        means = selected_means(losses, chosen[::-1], self.context.world)
        shares = [each.double().mean() for each in chosen]
        return {"loss0": means[0], "loss1": means[1], "selected0": shares[0], "selected1": shares[1]}


def small_losses(losses: Tensor, rate: float, among: Tensor) -> Tensor:
    """Those with the smallest losses, bool (b,): floor(rate n) of the n candidates, or all where that is none.

    Args:
        losses: (b,), of one network.
        rate: R, in (0, 1].
        among: bool (b,), the candidates.
    """
    num_candidates = among.sum()
    num_kept = (rate * num_candidates.double()).floor()
    num_kept = torch.where(num_kept > 0, num_kept, num_candidates)
    places = losses.masked_fill(~among, torch.inf).argsort(stable=True).argsort()
    return among & (places < num_kept)


def selected_means(losses: Sequence[Tensor], chosen: Sequence[Tensor], world: World) -> list[Tensor]:
    """This rank's shares of the means of all ranks' selected losses; their mean over the ranks is the global one.

    A collective: a rank that has selected nothing has a share of 0, with a gradient of 0. So has every rank where
    no rank has selected anything.

    Args:
        losses: (b,) of each network; b may differ between the ranks.
        chosen: bool (b,) for each network.
        world: the ranks.
    """
    counts = world.all_reduce(torch.stack([each.sum() for each in chosen])).clamp_min(1)
    return [
        (each * mask).sum() * (world.size / count) for each, mask, count in zip(losses, chosen, counts, strict=True)
    ]
