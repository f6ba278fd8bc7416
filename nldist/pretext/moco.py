"""MoCo-v2 (He et al., CVPR 2020; Chen et al., arXiv 2003.04297)."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nldist.dist.engine import average_buffers
from nldist.dist.rows import Exchange, gather_rows, global_mean, row_counts
from nldist.passes.base import Batches, Metrics, Pass
from nldist.passes.context import Context
from nldist.pretext.base import Pretext, PretextPass


class MoCo(Pretext):
    """Queries find their keys among the past keys of all ranks.

    Attributes:
        encoder: the momentum encoder, whose weights follow those of the trained network.
        queue: (pretext.queue, dim) past keys, the same on every rank.
        pointer: the row of the queue that is replaced next.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.encoder: nn.Module = copy.deepcopy(self.engines[0].model).requires_grad_(False)
        generator = torch.Generator().manual_seed(context.seed("queue"))
        start = torch.randn((self.settings.queue, self.settings.dim), generator=generator)
        self.queue = F.normalize(start, dim=1).to(context.world.device)
        self.pointer = 0
        self._follow = get_ema_multi_avg_fn(self.settings.momentum)  # type: ignore[no-untyped-call]

    @property
    def extra_bytes(self) -> int:
        """See Method."""
        return 4 * (sum(p.numel() for p in self.encoder.parameters()) + self.queue.numel())

    def train_pass(self, epoch: int) -> Pass:
        """See Pretext."""
        return MoCoPass(self, epoch)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the momentum encoder's weights towards the network's (MoCo, equation 2)."""
        self._follow(list(self.encoder.parameters()), list(self.engines[0].model.parameters()), None)

    def enqueue(self, keys: Tensor) -> None:
        """Replace the oldest keys by these (b, dim), b at most the queue's size."""
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.pointer = (self.pointer + len(keys)) % len(self.queue)

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        state = {"encoder": self.encoder.state_dict(), "queue": self.queue, "pointer": self.pointer}
        return super().state_dict() | state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        super().load_state_dict(state)
        self.encoder.load_state_dict(state["encoder"])
        self.queue.copy_(state["queue"])
        self.pointer = state["pointer"]

    def rank_state_dict(self) -> dict[str, Any]:
        """See Method."""
        return super().rank_state_dict() | {"encoder": dict(self.encoder.named_buffers())}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        super().load_rank_state_dict(state)
        for name, buffer in self.encoder.named_buffers():
            buffer.copy_(state["encoder"][name])


class MoCoPass(PretextPass):
    """One epoch over all images: one view is the query, the other one the key."""

    def __init__(self, method: MoCo, epoch: int) -> None:
        super().__init__(method, epoch)
        self._method = method
        self.num_rows = self.batch["all"]

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        super().start(num_steps, start_step)
        self._method.encoder.train()

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        method, world = self._method, self.context.world
        first, second = self.views(batches["all"])
        counts = row_counts(len(first), world)
        (query,) = self.engine.forward((first, "project"))
        key = self._keys(second, counts, step)
        losses = moco_loss(query, key, method.queue, self.settings.temperature)
        loss = global_mean(losses, counts, world)
        self.descend(loss, step)
        if self.engine.at_edge:
            method.follow()
        method.enqueue(gather_rows(key, world, counts))
        return {"loss": loss.detach()}

    def _keys(self, images: Tensor, counts: list[int], step: int) -> Tensor:
        """Keys (b, dim), no gradient, with shuffled batch norm (MoCo, section 3.3).

        Batches of rows from all ranks: a key's statistics must not tell which query it belongs to.
        """
        generator = self.context.generator("exchange", self.epoch, step, self.context.world.rank)
        exchange = Exchange(counts, self.context.world, generator)
        (keys,) = self.engine.predict((exchange.shuffle(images), "project"), by=self._method.encoder)
        return exchange.restore(keys)

    def finish(self) -> Metrics:
        """See Pass."""
        average_buffers(self._method.encoder, self.context.world)
        return super().finish()


def moco_loss(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Each query's -log [ exp(q.k / t) / (exp(q.k / t) + sum_{k' in queue} exp(q.k' / t)) ] (MoCo, equation 1).

    Args:
        query: (b, dim), of length 1.
        key: (b, dim), the same images' keys, without gradient.
        queue: (K, dim), keys of other images.
        temperature: t.

    Returns:
        (b,).
    """
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
    targets = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    return F.cross_entropy(logits, targets, reduction="none")
