"""One trained network: its forward, backward and step, over all ranks."""

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nldist.config import Config, Recipe
from nldist.dist.optimizer import build_optimizer
from nldist.dist.world import World

# (images, output, output, ...): what a network is asked for one batch.
Call = tuple[Any, ...]
# What becomes of a network's backbone in a forward: it learns; only batch norm's statistics follow; it stays as it is.
Backbone = Literal["learns", "follows", "stays"]


class Engine(ABC):
    """A network that is trained over all ranks, with its optimiser: what methods use. One per network.

    Subclasses say how gradients are reduced and what each rank keeps. `model` is the whole network on every rank,
    a plain module that methods may read, copy and load. Checkpoints are alike: each engine loads what another wrote.

    Batch-norm buffers are rank-local while a pass runs and averaged over the ranks by `finish_pass`: broadcasting
    them at each forward would overwrite them between the several forwards of one step.

    Args:
        model: the network.
        config: the run's.
        world: the ranks.
        recipe: of the stage that trains it; by default of the training itself.
    """

    def __init__(self, model: nn.Module, config: Config, world: World, recipe: Recipe | None = None) -> None:
        recipe = recipe or config.recipe
        self._world, self._optim, self._autocast = world, recipe.optim, config.train.autocast == "bf16"
        self._format = torch.channels_last if config.model.channels_last else torch.contiguous_format
        # A Network, or what has its `forward`.
        self.model: Any = model.to(world.device, memory_format=self._format)  # type: ignore[call-overload]
        self.averaged = None
        if recipe.ema_decay:
            average = get_ema_multi_avg_fn(recipe.ema_decay)  # type: ignore[no-untyped-call]
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        if config.model.compile:
            self.model.compile()
        self._step, self._num_steps = 0, 0

    @abstractmethod
    def _forward(self, calls: Sequence[Call], backbone: Backbone, last: bool) -> Sequence[Tensor]:
        """The network's outputs, in the precision of the forward; `last` of its accumulation group or not."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of this accumulation group."""

    @abstractmethod
    def _update(self, rate: float) -> None:
        """One optimiser step at this learning rate with the clipped mean of all ranks' gradients."""

    @abstractmethod
    def _optimizer_state(self) -> dict[str, Any]:
        """The state dict of `build_optimizer`'s optimiser over the whole network. A collective."""

    @abstractmethod
    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Load what `_optimizer_state` gave, into what this rank keeps of it."""

    def start_pass(self, num_steps: int, start_step: int) -> None:
        """Train mode; the next `forward` and `step` belong to step `start_step` of `num_steps`."""
        self.model.train()
        self._step, self._num_steps = start_step, num_steps

    @property
    def at_edge(self) -> bool:
        """Whether no accumulated gradient is pending."""
        return self._step % self._optim.accumulate == 0 or self._step == self._num_steps

    def _group(self) -> tuple[int, bool]:
        """Batches in the current accumulation group, and whether this is its last."""
        first = self._step - self._step % self._optim.accumulate
        stop = min(first + self._optim.accumulate, self._num_steps)
        return stop - first, self._step + 1 == stop

    def forward(self, *calls: Call, backbone: Backbone = "learns") -> list[Tensor]:
        """`Network.forward`, at least float32, with gradient: the one forward for the one backward of this step."""
        _, last = self._group()
        return [_at_least_float32(output) for output in self._forward(self._formatted(calls), backbone, last)]

    @torch.no_grad()
    def predict(self, *calls: Call, by: nn.Module | None = None) -> list[Tensor]:
        """`Network.forward` of this network (or of `by`, such as a peer) in its present mode, without a gradient.

        The outputs are at least float32. With autocast, weights are cast once for all of the calls.
        """
        with self._precision():
            predicted = (self.model if by is None else by)(*self._formatted(calls))
        return [_at_least_float32(output) for output in predicted]

    def infer(self, images: Tensor, *outputs: str) -> list[Tensor]:
        """Outputs of this network's latest weights in eval mode, at least float32, no gradient."""
        return self.predict((images, *outputs), by=self.model.eval())

    def evaluate(self, images: Tensor, *outputs: str) -> list[Tensor]:
        """Outputs of the averaged weights where they are kept, in eval mode, at least float32, no gradient."""
        return self.predict((images, *outputs), by=self.evaluated.eval())

    @property
    def evaluated(self) -> Any:
        """The network that `evaluate` uses."""
        return self.averaged.module if self.averaged else self.model

    def step(self, loss: Tensor, rate: float) -> None:
        """Backward from `loss`; at the end of an accumulation group also one optimiser step at this learning rate."""
        size, last = self._group()
        self._backward(loss / size)
        self._step += 1
        if last:
            self._update(rate)
            if self.averaged:
                self.averaged.update_parameters(self.model)

    def finish_pass(self) -> None:
        """Average the batch-norm statistics over the ranks. A collective."""
        for module in filter(None, (self.model, self.averaged)):
            average_buffers(module, self._world)

    def _formatted(self, calls: Sequence[Call]) -> list[Call]:
        return [(images.contiguous(memory_format=self._format), *outputs) for images, *outputs in calls]

    def _precision(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self._world.device.type, torch.bfloat16, enabled=self._autocast)

    def state_dict(self) -> dict[str, Any]:
        """Weights, averaged weights and optimiser, the same on every rank (buffers: those of this rank).

        A collective; the optimiser's state may be on rank 0 only.
        """
        state = {"model": self.model.state_dict(), "optimizer": self._optimizer_state()}
        return state | ({"averaged": self.averaged.state_dict()} if self.averaged else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        self.model.load_state_dict(state["model"])
        self._load_optimizer_state(state["optimizer"])
        if self.averaged:
            self.averaged.load_state_dict(state["averaged"])

    def rank_state_dict(self) -> dict[str, Any]:
        """The batch-norm buffers, which differ between ranks within a pass."""
        return {name: dict(module.named_buffers()) for name, module in self._buffer_owners() if module is not None}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `rank_state_dict` gave on the same rank."""
        for name, module in self._buffer_owners():
            if module is not None:
                module.load_state_dict(state[name], strict=False)

    def _buffer_owners(self) -> list[tuple[str, nn.Module | None]]:
        return [("model", self.model), ("averaged", self.averaged)]


class DDPEngine(Engine):
    """A network under DistributedDataParallel: every rank keeps all weights, gradients and optimiser state.

    With `partly` a step may leave parts of the network out (a second head, a frozen backbone): their weights and
    their optimiser state then stay as they are.
    """

    def __init__(
        self, model: nn.Module, config: Config, world: World, recipe: Recipe | None = None, *, partly: bool = False
    ) -> None:
        super().__init__(model, config, world, recipe)
        self._precise: nn.Module = Precise(self.model, self._precision)
        self._optimizer = build_optimizer(self.model, self._optim)
        self._partly = partly
        self._gradient_bytes = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)

    def _wrapped(self) -> nn.Module:
        with warnings.catch_warnings():
            # torch 2.15 renames broadcast_buffers, in a version newer than the oldest that we support.
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                self._precise,
                device_ids=[self._world.device] if self._world.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=self._partly,
            )

    def _forward(self, calls: Sequence[Call], backbone: Backbone, last: bool) -> Sequence[Tensor]:
        sync: contextlib.AbstractContextManager = contextlib.nullcontext()
        # Wrapped by the first step: DDP imports torch._dynamo, seconds and 150 MB that a rank which only looks at
        # images does without.
        if self._world.size > 1 and not isinstance(self._precise, DistributedDataParallel):
            self._precise = self._wrapped()
            if not self._partly:  # then DDP never regroups its buckets
                self._settle(calls)
        if isinstance(self._precise, DistributedDataParallel) and not last:
            sync = self._precise.no_sync()
        with sync:
            outputs: Sequence[Tensor] = self._precise(*calls, backbone=backbone)
        return outputs

    def _settle(self, calls: Sequence[Call]) -> None:
        """A backward pass of two images without effect, after which DDP regroups its gradient buckets once and for all.

        Left to the first real step, the regrouping would make a resumed run sum three or more ranks' gradients
        in another order than the undisturbed run: no longer bit-identical on a CPU.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        device = self._world.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            few = [(images[:2], *outputs) for images, *outputs in calls]
            total = torch.stack([output.float().sum() for output in self._precise(*few)]).sum()
            total.backward()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad()
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def _update(self, rate: float) -> None:
        self._world.count_all_reduce(self._gradient_bytes)  # DDP's, during the backward pass
        if self._optim.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._optim.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state_dict()
        return state

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)


class Precise(nn.Module):
    """A network in an engine's precision: what DDP or DeepSpeed wraps."""

    def __init__(self, network: nn.Module, precision: Callable[[], contextlib.AbstractContextManager]) -> None:
        super().__init__()
        self.network, self._precision = network, precision

    def forward(self, *calls: Call, **options: Any) -> Sequence[Tensor]:
        """The network's outputs."""
        with self._precision():
            outputs: Sequence[Tensor] = self.network(*calls, **options)
        return outputs


def _at_least_float32(outputs: Tensor) -> Tensor:
    """What a forward in bfloat16 gave, in float32."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def average_buffers(model: nn.Module, world: World) -> None:
    """Set every floating-point buffer to its mean over the ranks. A collective: one all-reduce."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if world.size == 1 or not buffers:
        return
    flat = world.all_reduce(torch.cat([b.flatten() for b in buffers])) / world.size
    for buffer, mean in zip(buffers, torch.split(flat, [b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))
