"""Learned and random policies: a few operations per image, with random or tabled magnitudes."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from nldist.data.augment import photometric, sampling
from nldist.data.augment.frame import Frame, Op, Span, filled
from nldist.data.augment.photometric import Kernel, apply_stages
from nldist.data.augment.spatial import hide_square, inverse_map
from nldist.data.draws import Draws


def _shear(pixels: Tensor, levels: Tensor, axis: int) -> Tensor:
    """Source place = place + level * place on the other axis, both from the top left corner."""
    matrix = torch.eye(2, device=pixels.device, dtype=levels.dtype).repeat(len(levels), 1, 1)
    matrix[:, axis, 1 - axis] = levels
    offset = torch.zeros(len(levels), 2, device=pixels.device, dtype=levels.dtype)
    offset[:, axis] = levels * pixels.shape[2 + axis] / 2
    return sampling.affine(pixels, _sizes(pixels), matrix, offset)


def _translate(pixels: Tensor, shifts: Tensor, axis: int) -> Tensor:
    matrix = torch.eye(2, device=pixels.device).expand(len(shifts), 2, 2)
    offset = torch.zeros(len(shifts), 2, device=pixels.device, dtype=shifts.dtype)
    offset[:, axis] = -shifts
    return sampling.affine(pixels, _sizes(pixels), matrix, offset)


def _rotate(pixels: Tensor, degrees: Tensor) -> Tensor:
    """Counter-clockwise about the middle."""
    matrix = inverse_map(torch.deg2rad(-degrees), torch.ones_like(degrees), torch.zeros_like(degrees))
    return sampling.affine(pixels, _sizes(pixels), matrix, torch.zeros_like(matrix[:, 0]))


def _sizes(pixels: Tensor) -> Tensor:
    return torch.tensor(pixels.shape[2:], device=pixels.device).expand(len(pixels), 2)


BANK: dict[str, Kernel | None] = {
    "identity": None,
    "shear_x": lambda pixels, levels: _shear(pixels, levels, 0),
    "shear_y": lambda pixels, levels: _shear(pixels, levels, 1),
    "translate_x": lambda pixels, shifts: _translate(pixels, shifts, 0),
    "translate_y": lambda pixels, shifts: _translate(pixels, shifts, 1),
    "rotate": _rotate,
    "brightness": photometric.brightness,
    "color": photometric.saturation,
    "contrast": photometric.contrast,
    "sharpness": photometric.sharpness,
    "posterize": photometric.posterize,
    "solarize": photometric.solarize,
    "autocontrast": photometric.autocontrast,
    "equalize": photometric.equalize,
    "invert": photometric.invert,
}
KINDS = {name: kind for kind, name in enumerate(BANK)}
KERNELS = tuple(BANK.values())
NO_MAGNITUDE = (0.0, 0.0)


def level_ranges(fraction: float, height: int, width: int) -> dict[str, tuple[float, float]]:
    """The two magnitudes (one for each sign) of every operation at a level from 0 to 1, as in torchvision.

    Factors and angles grow with the level; bits and thresholds fall; shifts are cut to whole pixels.
    """
    signed = {
        "shear_x": 0.3 * fraction,
        "shear_y": 0.3 * fraction,
        "translate_x": float(int(150 / 331 * width * fraction)),
        "translate_y": float(int(150 / 331 * height * fraction)),
        "rotate": 30 * fraction,
    }
    factors = dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (1 - 0.9 * fraction, 1 + 0.9 * fraction))
    bits, threshold = float(8 - round(4 * fraction)), 255 * (1 - fraction)
    return {
        **dict.fromkeys(("identity", "autocontrast", "equalize", "invert"), NO_MAGNITUDE),
        **{name: (-level, level) for name, level in signed.items()},
        **factors,
        "posterize": (bits, bits),
        "solarize": (threshold, threshold),
    }


class RandAugment(Op):
    """A few operations out of 14, all at one magnitude (Cubuk et al. 2020, scaled as in torchvision)."""

    op: Literal["rand_augment"] = "rand_augment"
    num_ops: int = Field(default=2, ge=1, description="Operations per image, drawn with replacement.")
    magnitude: int = Field(default=10, ge=0, description="Magnitude of all operations, 0 to num_bins - 1.")
    num_bins: int = Field(default=31, ge=2, description="Number of magnitudes: 31, or 11 for magnitudes 0 to 10.")

    @model_validator(mode="after")
    def _magnitude_has_a_bin(self) -> "RandAugment":
        if self.magnitude >= self.num_bins:
            raise ValueError(f"magnitude {self.magnitude} must be below num_bins, {self.num_bins}")
        return self

    names: ClassVar[tuple[str, ...]] = tuple(name for name in BANK if name != "invert")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Equally likely operations, and signs where an operation has them."""
        frame = filled(frame, self.op)
        levels = level_ranges(self.magnitude / (self.num_bins - 1), *frame.pixels.shape[2:])
        bank = {name: levels[name] for name in self.names}
        return frame.with_pixels(_random_ops(frame.pixels, rng, self.num_ops, bank, two_valued=True))


class StrongOurs(Op):
    """Four operations out of 14, each with a uniform magnitude, then one cutout.

    The strong augmentation of SCAN's and ScanMix's authors (docs/scanmix.md). The cutout has a length L, uniform in a
    range, and blanks 2 * floor(L / 2) pixels a side. Must be the last op.
    """

    op: Literal["strong_ours"] = "strong_ours"
    num_ops: int = Field(default=4, ge=1, description="Operations per image, drawn with replacement.")
    cutout: Span[PositiveInt] = Field(
        default=(1, 16), description="Range of the length L of the cutout, which blanks 2 * floor(L / 2) pixels a side."
    )

    hides: ClassVar[bool] = True

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Equally likely operations, equally likely magnitudes."""
        frame = filled(frame, self.op)
        height, width = frame.pixels.shape[2:]
        bank: dict[str, tuple[float, float]] = {
            **dict.fromkeys(("identity", "autocontrast", "equalize"), NO_MAGNITUDE),
            "rotate": (-30, 30),
            "solarize": (0, 256),
            **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), (0.05, 0.95)),
            **dict.fromkeys(("shear_x", "shear_y"), (-0.1, 0.1)),
            "translate_x": (-0.1 * width, 0.1 * width),
            "translate_y": (-0.1 * height, 0.1 * height),
            "posterize": (4, 8),
        }
        changed = frame.with_pixels(_random_ops(frame.pixels, rng, self.num_ops, bank, two_valued=False))
        low, high = self.cutout
        return hide_square(changed, rng, 2 * ((low + rng.below(high - low + 1)) // 2))


def _random_ops(
    pixels: Tensor, rng: Draws, num_ops: int, bank: Mapping[str, tuple[float, float]], *, two_valued: bool
) -> Tensor:
    """`num_ops` equally likely operations of the bank, at one end of their range, or anywhere in it."""
    entries = torch.tensor([(KINDS[name], *bank[name]) for name in bank], dtype=torch.float64, device=pixels.device)
    kinds, low, high = entries[(rng.uniform(num_ops) * len(bank)).long()].unbind(2)
    share = rng.uniform(num_ops)
    share = (share < 0.5).double() if two_valued else share
    return apply_stages(pixels, kinds.long(), low + (high - low) * share, KERNELS)


# 25 sub-policies of two operations: name, probability, magnitude of 0 to 9 (Cubuk et al. 2019, table 7).
CIFAR10_POLICY: Sequence[tuple[tuple[str, float, int], tuple[str, float, int]]] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


class AutoAugmentCIFAR10(Op):
    """The AutoAugment policy learned on CIFAR-10: one of 25 pairs of operations per image."""

    op: Literal["auto_augment_cifar10"] = "auto_augment_cifar10"

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Each operation of the pair with its own probability, magnitudes as in torchvision."""
        frame = filled(frame, self.op)
        table = policy_table(CIFAR10_POLICY, *frame.pixels.shape[2:]).to(frame.pixels.device)
        kinds, probabilities, low, high = table[rng.below(len(table))].unbind(2)
        kinds = torch.where(rng.uniform(2) < probabilities, kinds, KINDS["identity"]).long()
        magnitudes = torch.where(rng.uniform(2) < 0.5, low, high)
        return frame.with_pixels(apply_stages(frame.pixels, kinds, magnitudes, KERNELS))


def policy_table(
    policy: Sequence[tuple[tuple[str, float, int], tuple[str, float, int]]], height: int, width: int
) -> Tensor:
    """A policy as numbers, float64 (num_pairs, 2, 4): kind, probability, magnitude of either sign."""
    levels = [level_ranges(magnitude / 9, height, width) for magnitude in range(10)]
    rows = [
        [(KINDS[name], probability, *levels[magnitude][name]) for name, probability, magnitude in pair]
        for pair in policy
    ]
    return torch.tensor(rows, dtype=torch.float64)
