"""Random numbers that are a function of what they are for.

A counter-based generator: every number is the splitmix64 hash of (key..., draw, position, k), in 64-bit
integer arithmetic, so it is the same on a CPU and on a GPU and does not depend on the other samples of the
batch, their order, the rank or the worker (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators").
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_SLOTS = 1 << 16  # numbers that one position may draw


def _signed(value: int) -> int:
    """The same 64 bits, read as a two's complement number."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX2) & _MASK
    return z ^ (z >> 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX2)
    return z ^ _shift(z, 31)


class Draws:
    """One stream of uniform numbers per sample, for one op of a view.

    Successive calls give successive numbers of each sample's stream.
    """

    def __init__(self, state: Tensor, position: int) -> None:
        self._state = state
        self._next = position * _SLOTS + 1

    def uniform(self, num: int) -> Tensor:
        """The next `num` numbers of each sample: float64 (b, num), multiples of 2**-32 in [0, 1)."""
        counters = torch.arange(self._next, self._next + num, device=self._state.device)
        self._next += num
        hashed = _mix(self._state[:, None] + counters * _signed(_GOLDEN))
        return _shift(hashed, 32).double() * 2.0**-32

    def between(self, low: float, high: float) -> Tensor:
        """One number of each sample, uniform in [low, high): float64 (b,)."""
        return low + (high - low) * self.uniform(1)[:, 0]

    def below(self, bound: int) -> Tensor:
        """One integer of each sample, uniform in 0 to bound - 1: int64 (b,)."""
        return (self.uniform(1)[:, 0] * bound).long()

    def chance(self, probability: float) -> Tensor:
        """True with this probability, for each sample: bool (b,)."""
        return self.uniform(1)[:, 0] < probability


class DrawSource:
    """Where the streams of a batch come from: a key (seed, epoch, view, ...) and the draw id of each sample.

    Args:
        key: integers that all samples share.
        draws: int64 (b,), one id per occurrence of a sample.
    """

    def __init__(self, key: Sequence[int], draws: Tensor) -> None:
        state = 0
        for part in key:
            state = _mix_int((state + _mix_int((part + _GOLDEN) & _MASK) + _GOLDEN) & _MASK)
        self._state = _mix(_mix(draws + _signed(_GOLDEN)) + _signed(state))

    def at(self, position: int) -> Draws:
        """The streams of the op at this position of a view."""
        return Draws(self._state, position)
