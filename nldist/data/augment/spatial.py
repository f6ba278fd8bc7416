"""Ops that move pixels: crops, resizing, flips, affine maps; and cutout."""

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from nldist.data.augment import sampling
from nldist.data.augment.frame import Frame, Op, Span, filled
from nldist.data.augment.sampling import Interpolation
from nldist.data.draws import Draws

NUM_TRIES = 10  # boxes that random_resized_crop draws before it takes the middle, as torchvision does


class PadCrop(Op):
    """Crop at a random place of the image padded with zeros; too small an image is padded further."""

    op: Literal["pad_crop"] = "pad_crop"
    size: int = Field(ge=1, description="Side of the square crop, in pixels.")
    padding: int = Field(ge=0, description="Zeros added on each side before the crop, in pixels.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Every place that fits, equally likely."""
        return _random_crop(frame, rng, self.size, self.padding)


class RandomCrop(Op):
    """Crop at a random place inside the image; too small an image lies at a random place among zeros."""

    op: Literal["random_crop"] = "random_crop"
    size: int = Field(ge=1, description="Side of the square crop, in pixels.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Every place that fits, equally likely."""
        return _random_crop(frame, rng, self.size, padding=0)


class CenterCrop(Op):
    """Crop the middle; too small an image is padded with zeros on both sides."""

    op: Literal["center_crop"] = "center_crop"
    size: int = Field(ge=1, description="Side of the square crop, in pixels.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Margins equal up to one pixel, rounded as torchvision does."""
        slack = frame.view_sizes - self.size
        return _crop(frame, torch.where(slack > 0, (slack / 2).round().long(), -(-slack // 2)), self.size)


class Resize(Op):
    """Scale the short side to a given length, with antialiasing; the aspect ratio is kept."""

    op: Literal["resize"] = "resize"
    size: int = Field(ge=2, description="New length of the short side, in pixels.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Note the new sizes: the interpolation waits for the crop behind, to be done once."""
        sizes = frame.view_sizes
        resized = sizes * self.size // sizes.amin(1, keepdim=True)
        # The long side is rounded down, by less than one pixel of at least `size`.
        max_step = min(frame.pixels.shape[2:]) / (self.size - 1)
        return replace(frame, resized=resized, max_step=max_step, same_size=False)


class RandomResizedCrop(Op):
    """Crop a box of random area and aspect ratio and scale it to a square, with antialiasing."""

    op: Literal["random_resized_crop"] = "random_resized_crop"
    size: int = Field(ge=1, description="Side of the result, in pixels.")
    scale: Span[PositiveFloat] = Field(default=(0.08, 1.0), description="Range of the box's share of the image's area.")
    ratio: Span[PositiveFloat] = Field(default=(3 / 4, 4 / 3), description="Range of the box's width over its height.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """As torchvision's RandomResizedCrop: ten tries, then the largest allowed box in the middle."""
        corners, shapes = self.boxes(frame.view_sizes, rng)
        start, end = corners * frame.step, (corners + shapes) * frame.step
        # Rounding must not push a box that ends with its image into the padding.
        bounds = torch.stack([start.floor(), torch.minimum(end.ceil(), frame.sizes)], dim=2).long()
        height, width = frame.pixels.shape[2:]
        step = shapes * frame.step / self.size
        max_step = (height / self.size, width / self.size)
        pixels = sampling.resample(frame.pixels, start, step, bounds, max_step, (self.size, self.size))
        return Frame(pixels, torch.full_like(frame.sizes, self.size), same_size=True)

    def boxes(self, sizes: Tensor, rng: Draws) -> tuple[Tensor, Tensor]:
        """Top left corners and (height, width) of one box in each image, int64 (b, 2) both."""
        areas, ratios = rng.uniform(NUM_TRIES), rng.uniform(NUM_TRIES)
        areas = sizes.prod(1, keepdim=True) * (self.scale[0] + (self.scale[1] - self.scale[0]) * areas)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratios = (low + (high - low) * ratios).exp()
        tries = torch.stack([(areas / ratios).sqrt(), (areas * ratios).sqrt()], dim=2).round().long()
        fits = ((tries > 0) & (tries <= sizes[:, None])).all(2)
        chosen = tries.gather(1, fits.long().argmax(1)[:, None, None].expand(-1, 1, 2))[:, 0]
        found = fits.any(1, keepdim=True)
        shapes = torch.where(found, chosen, self._largest(sizes))
        slack = sizes - shapes
        return torch.where(found, (rng.uniform(2) * (slack + 1)).long(), slack // 2), shapes

    def _largest(self, sizes: Tensor) -> Tensor:
        height, width = sizes.unbind(1)
        shortest = (width / self.ratio[0]).round().long()
        narrowest = (height * self.ratio[1]).round().long()
        return torch.stack([torch.minimum(height, shortest), torch.minimum(width, narrowest)], dim=1)


class Flip(Op):
    """Mirror left and right."""

    op: Literal["flip"] = "flip"
    p: float = Field(default=0.5, ge=0, le=1, description="Probability of mirroring an image.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Mirror each chosen image inside its own width."""
        chosen = rng.chance(self.p)
        if frame.same_size:
            return frame.with_pixels(torch.where(chosen[:, None, None, None], frame.pixels.flip(3), frame.pixels))
        columns = torch.arange(frame.pixels.shape[3], device=frame.pixels.device).expand(len(chosen), -1)
        mirrored = frame.sizes[:, 1:] - 1 - columns
        columns = torch.where(chosen[:, None] & (mirrored >= 0), mirrored, columns)
        return frame.with_pixels(frame.pixels.gather(3, columns[:, None, None].expand_as(frame.pixels)))


class Affine(Op):
    """Rotate, shift, scale and shear about the middle, zero outside, as torchvision's RandomAffine."""

    op: Literal["affine"] = "affine"
    degrees: float = Field(default=0.0, ge=0, le=180, description="Rotation is uniform in -degrees to degrees.")
    translate: tuple[float, float] = Field(
        default=(0.0, 0.0), description="Largest shift in x and y, as shares of the side."
    )
    scale: Span[PositiveFloat] = Field(default=(1.0, 1.0), description="Range of the scale factor.")
    shear: float = Field(
        default=0.0, ge=0, lt=90, description="Shear along x is uniform in -shear to shear, in degrees."
    )
    interpolation: Interpolation = Field(default="nearest", description="How source pixels are interpolated.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """One inverse map per image: shift back, then undo rotation, scale and shear."""
        frame = frame if frame.resized is None else filled(frame, self.op)
        angle = torch.deg2rad(rng.between(-self.degrees, self.degrees))
        limits = frame.sizes.flip(1) * torch.tensor(self.translate, dtype=torch.float64, device=angle.device)
        shift = ((2 * rng.uniform(2) - 1) * limits).round()
        scale = rng.between(*self.scale)
        shear = torch.deg2rad(rng.between(-self.shear, self.shear)).tan()
        matrix = inverse_map(angle, scale, shear)
        offset = -(matrix * shift[:, None, :]).sum(2)
        return frame.with_pixels(sampling.affine(frame.pixels, frame.sizes, matrix, offset, self.interpolation))


class Cutout(Op):
    """Blank a square at a random place: zero behind the normalisation. Must be the last op."""

    op: Literal["cutout"] = "cutout"
    side: PositiveInt | Span[PositiveInt] = Field(
        description="Side of the square in pixels, or the range it is uniform in."
    )

    hides: ClassVar[bool] = True

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Mark the square; its middle is any pixel, so that it may stick out (DeVries and Taylor 2017)."""
        low, high = (self.side, self.side) if isinstance(self.side, int) else self.side
        return hide_square(filled(frame, self.op), rng, low + rng.below(high - low + 1))


def hide_square(frame: Frame, rng: Draws, sides: Tensor) -> Frame:
    """Mark one square per image as hidden, with `sides` (b,) in pixels, around any pixel."""
    first = (rng.uniform(2) * frame.sizes).long() - (sides // 2)[:, None]
    rows, columns = (_is_within(first[:, axis], sides, length) for axis, length in enumerate(frame.pixels.shape[2:]))
    hidden = (rows[:, :, None] & columns[:, None, :])[:, None]
    return replace(frame, hidden=hidden)


def inverse_map(angle: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Inverse of rotation * scale * shear along x, as matrices (b, 2, 2) on (x, y) with y down.

    Args:
        angle: radians (b,), clockwise on the screen.
        scale: factors (b,).
        shear: tangents of the shear angles (b,).
    """
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = (cos - shear * sin, sin + shear * cos, -sin, cos)
    return torch.stack(rows, dim=1).view(-1, 2, 2)


def _is_within(first: Tensor, count: Tensor, length: int) -> Tensor:
    places = torch.arange(length, device=first.device)
    return (places >= first[:, None]) & (places < (first + count)[:, None])


def _random_crop(frame: Frame, rng: Draws, size: int, padding: int) -> Frame:
    slack = frame.view_sizes + 2 * padding - size
    low, high = slack.clamp(max=0), slack.clamp(min=0)
    corners = low + (rng.uniform(2) * (high - low + 1)).long()
    return _crop(frame, corners - padding, size)


def _crop(frame: Frame, corners: Tensor, size: int) -> Frame:
    if frame.resized is None:
        pixels = sampling.crop(frame.pixels, frame.sizes, corners, size)
    else:
        bounds = torch.stack([torch.zeros_like(frame.sizes), frame.sizes], dim=2)
        max_step = (frame.max_step, frame.max_step)
        start = corners * frame.step
        pixels = sampling.resample(frame.pixels, start, frame.step, bounds, max_step, (size, size))
    return Frame(pixels, torch.full_like(frame.sizes, size), same_size=True)
