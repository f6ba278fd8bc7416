"""The engine on DeepSpeed, ZeRO stages 0, 1 and 2."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from nldist.config import Config, EngineSection, OptimSection, Recipe
from nldist.dist.deepspeed_settings import deepspeed_settings
from nldist.dist.engine import Backbone, Call, Engine, Precise
from nldist.dist.optimizer import build_optimizer
from nldist.dist.world import World
from nldist.errors import UserError

# Optimisers that may be given a part of a parameter; not LARS or LAMB, which look at its norm.
_ELEMENTWISE = (torch.optim.SGD, torch.optim.Adam)


@dataclass(frozen=True)
class Piece:
    """What this rank updates of one parameter: its elements from `start` on, which are at `offset` of `flat`."""

    flat: Tensor  # (P,) float32: this rank's master copy of a group's weights, the optimiser's parameter
    offset: int
    start: int
    length: int  # 0: all of it is other ranks'

    def of(self, flat: Tensor) -> Tensor:
        """The piece in `flat`, or in a tensor (P,) of the optimiser's state."""
        return flat.data.narrow(0, self.offset, self.length)

    def of_whole(self, whole: Tensor) -> Tensor:
        """The piece in a tensor of the parameter's shape."""
        return whole.data.flatten().narrow(0, self.start, self.length)


class DeepSpeedEngine(Engine):
    """A network under DeepSpeed, with torch's optimisers.

    ZeRO makes the parameters of each group of the optimiser one flat tensor and gives every rank a piece of it: stage 1
    leaves a rank the optimiser's state of its piece alone, stage 2 also the gradients.

    With `partly` a step may leave parts of the network out (a second head, a frozen backbone): their weights and
    their optimiser state then stay as they are.

    Raises:
        UserError: DeepSpeed cannot do what the configuration wants.
    """

    def __init__(
        self, model: nn.Module, config: Config, world: World, recipe: Recipe | None = None, *, partly: bool = False
    ) -> None:
        super().__init__(model, config, world, recipe)
        deepspeed = _import_deepspeed(world)
        if not dist.is_initialized():  # DeepSpeed needs a group, also of one rank; World ends it
            backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        self._stage = config.engine.zero_stage
        network = self._network()
        self._optimizer = build_optimizer(network, self._optim)
        if self._stage and not isinstance(self._optimizer, _ELEMENTWISE):
            raise UserError(f"optim.name={self._optim.name} needs whole parameters; set engine.zero_stage=0")
        # The optimiser's state dict as every engine writes it: numbers instead of parameters.
        self._groups = self._optimizer.state_dict()["param_groups"]
        self._parameters: list[Any] = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._shapes = [p.shape for p in self._parameters]
        self._parts = _divide(self._optimizer, network) if partly else []
        precise = Precise(network, self._precision)
        self._deepspeed = _initialize(deepspeed, precise, self._optimizer, config.engine, self._optim, world)
        self._pieces = list(self._find_pieces()) if self._stage else []

    def _network(self) -> nn.Module:
        """The module that DeepSpeed trains; it takes weights in the plain memory format only."""
        network: nn.Module = self.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return network

    def _find_pieces(self) -> Iterator[Piece | None]:
        """This rank's piece of each of `_parameters`, None for one that is not trained."""
        zero = self._deepspeed.optimizer
        groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
        flats = {parameter: flat for group, flat in groups for parameter in group}
        for parameter in self._parameters:
            if parameter not in flats:
                yield None
            elif (mapping := parameter._hp_mapping) is None:
                yield Piece(flats[parameter], 0, 0, 0)
            else:
                master, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Piece(flats[parameter], master.start, whole.start, whole.numel)

    def start_pass(self, num_steps: int, start_step: int) -> None:
        """See Engine. What has been written into `model` since the last pass counts from now on."""
        super().start_pass(num_steps, start_step)
        self._adopt()

    def _adopt(self) -> None:
        """Take this rank's pieces from the weights of `model`."""
        for piece, parameter in zip(self._pieces, self._parameters, strict=bool(self._stage)):
            if piece is not None:
                piece.of(piece.flat).copy_(piece.of_whole(parameter))

    def _forward(self, calls: Sequence[Call], backbone: Backbone, last: bool) -> Sequence[Tensor]:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        outputs: Sequence[Tensor] = self._deepspeed(*calls, backbone=backbone)
        return outputs

    def _backward(self, loss: Tensor) -> None:
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def _update(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._deepspeed.step()
        for part in self._parts:
            part.used.clear()

    def _optimizer_state(self) -> dict[str, Any]:
        state = {}
        for number, parameter in enumerate(self._parameters):
            values = self._gathered(number) if self._stage else self._optimizer.state.get(parameter)
            if values:
                state[number] = values
        return {"state": state, "param_groups": self._groups}

    def _gathered(self, number: int) -> dict[str, Any] | None:
        """The optimiser's state of a parameter from all ranks' pieces, on rank 0."""
        piece = self._pieces[number]
        if piece is None or not self._optimizer.state.get(piece.flat):
            return None
        values = {}
        for key, value in self._optimizer.state[piece.flat].items():
            values[key] = value.clone() if key == "step" else self._assembled(number, piece, value)
        return values if self._world.is_main else None

    def _assembled(self, number: int, piece: Piece, flat: Tensor) -> Tensor:
        """A parameter's whole tensor of what is in `flat`, on the CPU. A collective."""
        shape = self._shapes[number]
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=flat.device)
        piece.of_whole(whole).copy_(piece.of(flat))
        self._world.all_reduce(whole)
        return whole.view(shape).cpu()

    def _load_optimizer_state(self, state: dict[str, Any]) -> None:
        self._adopt()
        for number, values in state["state"].items():
            piece = self._pieces[number] if self._stage else None
            owner = piece.flat if piece is not None else self._parameters[number]
            mine = self._optimizer.state[owner]
            for key, value in values.items():
                if piece is None or key == "step":
                    mine[key] = value.to(owner.device if key != "step" else value.device, copy=True)
                else:
                    piece.of(mine.setdefault(key, torch.zeros_like(owner.data))).copy_(piece.of_whole(value))


@dataclass(eq=False)
class _Part:
    """A part of the network that a step leaves out as a whole or not at all; `used` in the present step."""

    parameters: list[Parameter] = field(default_factory=list)
    used: set[Parameter] = field(default_factory=set)

    def add(self, parameter: Parameter) -> None:
        self.parameters.append(parameter)
        parameter.register_post_accumulate_grad_hook(self.used.add)  # type: ignore[no-untyped-call]


def _divide(optimizer: torch.optim.Optimizer, network: nn.Module) -> list[_Part]:
    """Give each part of the network a group of its own: ZeRO updates a group as a whole, with zeros for no gradient.

    Parts are the backbone and the heads.
    """
    parts: dict[str, _Part] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(name.partition(".")[0], _Part()).add(parameter)
    optimizer.param_groups = [
        group | {"params": members, "part": part}
        for group in optimizer.param_groups
        for part in parts.values()
        if (members := [p for p in group["params"] if p in set(part.parameters)])
    ]
    optimizer.register_step_pre_hook(_leave_out)
    return list(parts.values())


def _leave_out(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step: no gradient, instead of zeros, for what has had none."""
    for group in optimizer.param_groups:
        part = group["part"]
        assert len(part.used) in (0, len(part.parameters)), "a step uses a part of the network as a whole or not at all"
        if not part.used:
            for parameter in group["params"]:
                parameter.grad = None


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this device, and quieten it: its warnings are about what the engine does on purpose."""
    os.environ["DS_ACCELERATOR"] = world.device.type
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if world.device.type == "cpu":
        # It would compile an operation of its own for shared memory, for minutes; gloo does without.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _initialize(
    deepspeed: Any,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    engine: EngineSection,
    optim: OptimSection,
    world: World,
) -> Any:
    settings = deepspeed_settings(engine, optim, sum(p.numel() for p in network.parameters()))
    try:
        deepspeed.DeepSpeedConfig(dict(settings))
    except Exception as error:  # whatever its checks raise, it is about what the file says
        raise UserError(f"DeepSpeed refuses engine.config {engine.config}: {' '.join(str(error).split())}") from None
    place = SimpleNamespace(device_rank=world.device.index or 0)
    made, *_ = deepspeed.initialize(
        place, model=network, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return made
