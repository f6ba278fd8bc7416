"""Batches from a worker process to its consumer through shared memory that is used again and again.

Fresh shared memory for every batch costs more than half as much time as decoding it does: each of its pages must be
faulted in and cleared. So a worker keeps a few buffers. Their first byte says whether the consumer still uses
them; it is cleared when the last tensor that lies in the buffer is gone.
"""

import os
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nldist.data.decode import OFF_ALIGNMENT

_HEADER = 64 + OFF_ALIGNMENT
_MOST_BUFFERS = 16

Key = tuple[str, int, int]

_mapped: dict[Key, np.ndarray] = {}
"""The consumer's views of the workers' buffers."""


class BufferPool:
    """A worker's buffers.

    Args:
        name: of the stream; the consumer passes it to `forget` at the end.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffers: list[Tensor] = []
        self._is_new: list[bool] = []

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor, uint8 of this shape, in a buffer that is free; its contents are arbitrary.

        If the consumer holds on to all the buffers there may be, the tensor has memory of its own.
        """
        num_bytes = int(np.prod(shape))
        slot = self._free_slot(_HEADER + num_bytes)
        if slot is None:
            return torch.empty(shape, dtype=torch.uint8)
        buffer = self._buffers[slot]
        buffer[0] = 1
        return buffer[_HEADER : _HEADER + num_bytes].view(shape)

    def pack(self, tensor: Tensor) -> "Tensor | Parcel":
        """What to send for `tensor`, which came from `empty` (or is its front part)."""
        address = tensor.untyped_storage().data_ptr()
        for slot, buffer in enumerate(self._buffers):
            if buffer.data_ptr() == address:
                is_new, self._is_new[slot] = self._is_new[slot], False
                key = (self._name, os.getpid(), slot)
                return Parcel(key, buffer if is_new else None, tuple(tensor.shape))
        return tensor

    def _free_slot(self, num_bytes: int) -> int | None:
        """A free buffer of at least this size, made or made anew if need be."""
        free = [slot for slot, buffer in enumerate(self._buffers) if not buffer[0]]
        for slot in free:
            if len(self._buffers[slot]) >= num_bytes:
                return slot
        if free:
            slot = free[0]
        elif len(self._buffers) < _MOST_BUFFERS:
            slot = len(self._buffers)
            self._buffers.append(torch.empty(0))
            self._is_new.append(True)
        else:
            return None
        # Some room to grow: batches of photographs differ in their largest sides.
        self._buffers[slot], self._is_new[slot] = _shared(num_bytes + num_bytes // 4), True
        return slot


def _shared(num_bytes: int) -> Tensor:
    """Zeros in shared memory that no file name refers to, as torch's own collate function makes them."""
    storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class Parcel:
    """A tensor in a buffer on its way: unpickling it, in the consumer, gives the tensor."""

    def __init__(self, key: Key, buffer: Tensor | None, shape: tuple[int, ...]) -> None:
        self._contents = key, buffer, shape

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, self._contents


def forget(name: str) -> None:
    """Let go of the buffers of the stream `name`; tensors that lie in them stay valid."""
    for key in [key for key in _mapped if key[0] == name]:
        del _mapped[key]


def _unpack(key: Key, buffer: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if buffer is not None:
        _mapped[key] = buffer.numpy()
    whole = _mapped[key]
    part = whole[_HEADER : _HEADER + int(np.prod(shape))]
    # The tensor's storage holds `part`, so `part` goes with the last tensor that shares the storage.
    weakref.finalize(part, whole.__setitem__, 0, 0).atexit = False
    return torch.from_numpy(part).view(shape)
