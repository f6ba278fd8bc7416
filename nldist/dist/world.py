"""The process group as one object: rank facts, the few collectives that nldist needs, and the stop flag."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nldist.dist.environment import Place
from nldist.dist.failure import end_failed
from nldist.dist.memory import keep_freed_memory
from nldist.errors import UserError, known

T = TypeVar("T")

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


@dataclass
class World:
    """This process's place among the ranks of a run.

    Collectives work on CPU tensors (gloo) and, where there are GPUs, on CUDA tensors (nccl). With one rank
    they are identities and no process group exists.

    Attributes:
        sent_bytes: what this rank has sent to others, as ring algorithms send it (Patarasuk and Yuan 2009): an
            all-reduce of n bytes sends 2 n (W - 1) / W, an all-gather of n bytes each n (W - 1), an all-to-all what
            is for others. Objects and barriers, of some bytes, are not counted, nor is what DeepSpeed sends by itself.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    sent_bytes: float = field(default=0.0, compare=False)

    @classmethod
    def single(cls) -> "World":
        """A world of one rank on the CPU."""
        return cls(0, 1, 0, torch.device("cpu"))

    @classmethod
    @contextlib.contextmanager
    def start(
        cls,
        *,
        num_threads: int | None = None,
        timeout_seconds: float = 1800,
        device: str = "auto",
        interface: str | None = None,
    ) -> Iterator["World"]:
        """Join the process group that the environment describes (see `Place`), or be a world of one without it.

        Args:
            num_threads: threads of torch on this rank; by default its own cores, or the node's shared among its ranks.
            timeout_seconds: after this long in one collective the run fails instead of waiting on.
            device: "auto" (the local rank's GPU where there is one), "cpu" or "cuda".
            interface: network interface of gloo and nccl, such as "ib0"; by default they choose.

        An exception inside the block is printed with the rank's number and ends the process with code 1, so
        that the other ranks' collectives fail too; they then name the rank that failed first.
        """
        place, problem = Place.find(), None
        try:
            chosen = _device(device, place.local_rank)
        except UserError as error:
            if place.size == 1:
                raise
            # Told when all ranks have met: the others would wait for this one.
            chosen, problem = torch.device("cpu"), error
        world = cls(place.rank, place.size, place.local_rank, chosen)
        torch.set_num_threads(num_threads or place.num_threads or _shared_threads(place))
        if world.device.type == "cpu":
            keep_freed_memory()
        if world.size > 1:
            _init_process_group(world, place, timeout_seconds, interface)
        if problem is not None:
            end_failed(problem, world.rank, world.size)
        try:
            yield world
            if world.size > 1:
                dist.barrier()
        except (Exception, KeyboardInterrupt) as error:
            if world.size == 1:
                raise
            end_failed(known(error), world.rank, world.size)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def seed(self, seed: int) -> None:
        """Seed torch's global generators that this rank draws from, the CPU's and its device's.

        torch.manual_seed notes a traceback for every other kind of device too: 0.1 ms and more, in each step.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "min", "max"] = "sum") -> Tensor:
        """Reduce `tensor` over the ranks in place and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, _OPERATIONS[op])
            self.count_all_reduce(tensor.nbytes)
        return tensor

    def count_all_reduce(self, num_bytes: int) -> None:
        """Count an all-reduce that somebody else does, such as DDP's of gradients."""
        self.sent_bytes += 2 * num_bytes * (self.size - 1) / self.size

    def all_gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, all of one shape, in rank order."""
        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(everyone, tensor)
        self.sent_bytes += tensor.nbytes * (self.size - 1)
        return everyone

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Send the next `sent[r]` rows to each rank r; returns the `received[r]` rows of each r, in rank order."""
        if self.size == 1:
            return rows
        result = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(result, rows.contiguous(), list(received), list(sent))
        self.sent_bytes += rows.nbytes - sent[self.rank] * rows[:1].nbytes
        return result

    def all_gather(self, array: np.ndarray) -> np.ndarray:
        """Concatenate every rank's `array` of shape (n_r, ...) along the first axis, in rank order."""
        if self.size == 1:
            return array
        lengths = np.zeros(self.size, np.int64)
        lengths[self.rank] = len(array)
        lengths = self.all_reduce(torch.from_numpy(lengths)).numpy()
        row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))
        mine = torch.zeros(int(lengths.max()) * row_bytes, dtype=torch.uint8)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        mine[: flat.size] = torch.from_numpy(flat)
        everyone = self.all_gather_tensor(mine)
        parts = [t.numpy()[: n * row_bytes] for t, n in zip(everyone, lengths, strict=True)]
        return np.concatenate(parts).view(array.dtype).reshape(-1, *array.shape[1:])

    def broadcast_object(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("dist.device=cuda, but torch finds no GPU here; use dist.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(f"local rank {local_rank} has no GPU of its own: this node has {num_gpus}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _init_process_group(world: World, place: Place, timeout_seconds: float, interface: str | None) -> None:
    if interface:
        os.environ.update(GLOO_SOCKET_IFNAME=interface, NCCL_SOCKET_IFNAME=interface)
    if place.address:
        os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timedelta(seconds=timeout_seconds))


def _shared_threads(place: Place) -> int:
    return max(1, len(os.sched_getaffinity(0)) // place.num_local)
