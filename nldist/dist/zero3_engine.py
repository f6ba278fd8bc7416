"""The engine on DeepSpeed's ZeRO stage 3, which divides the weights too."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nldist.config import Config
from nldist.dist.deepspeed_engine import DeepSpeedEngine, Piece
from nldist.dist.world import World


class Zero3Engine(DeepSpeedEngine):
    """Two modules: DeepSpeed trains one, of whose weights each rank has pieces; `model` is a plain, whole one beside it.

    DeepSpeed gathers the weights layer by layer in every forward, in collectives that no rank may miss. But in sweeps
    and evaluation ranks make different numbers of forwards, and some methods read weights within their steps. All that
    uses `model`, which the ranks bring up to date together: at the end of a pass, and in a pass that `reads` it
    after every update. While a pass does not, it takes no memory.
    """

    def __init__(self, model: nn.Module, config: Config, world: World, *, partly: bool = False) -> None:
        super().__init__(model, config, world, partly=partly)
        for plain, twin in zip(self.model.modules(), self._twin.modules(), strict=True):
            twin._buffers = plain._buffers
        self._plain: dict[Any, nn.Parameter] = dict(zip(self._twin.parameters(), self.model.parameters(), strict=True))
        self._whole, self._reads = True, True

    def _network(self) -> nn.Module:
        self._twin = copy.deepcopy(super()._network())
        return self._twin

    def _find_pieces(self) -> Iterator[Piece | None]:
        zero = self._deepspeed.optimizer
        for parameter in self._parameters:
            if parameter.requires_grad:
                group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                yield Piece(zero.fp32_partitioned_groups_flat[group], offset, *self._place(parameter))
            else:
                yield None

    def _place(self, parameter: Any) -> tuple[int, int]:
        """Start and length of this rank's piece of a parameter; the last ranks' may be short or empty."""
        size = parameter.ds_tensor.numel()
        start = min(self._world.rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def start_pass(self, num_steps: int, start_step: int, *, reads: bool = True) -> None:
        """See Engine."""
        super().start_pass(num_steps, start_step, reads=reads)
        self._reads = reads or self.averaged is not None
        if not self._reads:
            self._release()

    def _adopt(self) -> None:
        for piece, parameter in zip(self._pieces, self._parameters, strict=True):
            if piece is not None:
                piece.of(piece.flat).copy_(piece.of_whole(self._plain[parameter]))
        for parameter, plain in self._plain.items():
            start, length = self._place(parameter)
            parameter.ds_tensor.data[:length] = plain.data.flatten()[start : start + length]
            if parameter.numel() == plain.numel():  # small ones stay whole on every rank
                parameter.data.copy_(plain.data)

    def _gather(self) -> None:
        """Bring `model` up to date. A collective."""
        trained = [number for number, piece in enumerate(self._pieces) if piece is not None]
        sizes = [self._shapes[number].numel() for number in trained]
        flat = torch.zeros(sum(sizes), device=self._world.device)
        for number, part in zip(trained, torch.split(flat, sizes), strict=True):
            piece = self._pieces[number]
            assert piece is not None
            piece.of_whole(part).copy_(piece.of(piece.flat))
        self._world.all_reduce(flat)
        for number, part in zip(trained, torch.split(flat, sizes), strict=True):
            self._plain[self._parameters[number]].data = part.view(self._shapes[number])
        self._whole = True

    def _release(self) -> None:
        """Give the memory of `model` back, until it is gathered again."""
        for parameter, plain in self._plain.items():
            if parameter.requires_grad:
                plain.data = plain.new_empty(0)
        self._whole = False

    def _forward(self, batches: Sequence[Tensor], last: bool) -> Sequence[Tensor]:
        for plain, twin in zip(self.model.modules(), self._twin.modules(), strict=True):
            # Train mode, and what else methods switch on their networks.
            twin.__dict__.update({name: value for name, value in vars(plain).items() if isinstance(value, (bool, str))})
        return super()._forward(batches, last)

    def _update(self, rate: float) -> None:
        super()._update(rate)
        if self._parts:
            # DeepSpeed would keep these gradients for a step that leaves the part out.
            self._deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
        if self._reads:
            self._gather()

    def finish_pass(self) -> None:
        """See Engine."""
        if not self._whole:
            self._gather()
        super().finish_pass()

    def state_dict(self) -> dict[str, Any]:
        """See Engine."""
        whole = self._whole
        if not whole:
            self._gather()
        state = super().state_dict()
        if not whole:
            self._release()
        return state
