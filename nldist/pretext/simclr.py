"""SimCLR (Chen et al., ICML 2020), in the asymmetric variant that SCAN's code uses."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.dist.rows import first_row, gather_rows, global_mean, row_counts
from nldist.dist.world import World
from nldist.passes.base import Batches, Pass
from nldist.pretext.base import Pretext, PretextPass


class SimCLR(Pretext):
    """Two views of one image come closer, and all other views of the global batch go away."""

    def train_pass(self, epoch: int) -> Pass:
        """See Pretext."""
        return SimCLRPass(self, epoch)


class SimCLRPass(PretextPass):
    """One epoch over all images, two views of each in one forward."""

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        (projections,) = self.engine.forward((torch.cat(self.views(batches["all"])), "project"))
        first, second = projections.chunk(2)
        loss = simclr_loss(first, second, self.settings.temperature, self.context.world)
        self.descend(loss, step)
        return {"loss": loss.detach()}


def simclr_loss(first: Tensor, second: Tensor, temperature: float, world: World) -> Tensor:
    """This rank's share of the contrastive loss of the global batch (SimCLR, equation 1). A collective.

        L = - mean_i log [ exp(z_i.z'_i / t) / sum_{k in both views, k != i itself} exp(z_i.z_k / t) ]

    The anchors z_i are the first views. The mean of the shares over the ranks is L and, under DDP's averaging,
    the gradient is that of L of the concatenated batch.

    Args:
        first: (b, dim), of length 1; b may differ between the ranks.
        second: (b, dim), the same images' other views.
        temperature: t.
        world: the ranks, whose images are negatives for each other.
    """
    num_anchors = len(first)
    counts = row_counts(2 * num_anchors, world)
    logits = first @ gather_rows(torch.cat([first, second]), world, counts).T / temperature
    own = first_row(counts, world) + torch.arange(num_anchors, device=first.device)
    logits = logits.scatter(1, own[:, None], -torch.inf)
    losses = F.cross_entropy(logits, own + num_anchors, reduction="none")
    return global_mean(losses, [count // 2 for count in counts], world)
