"""Ops that change colours or sharpness and leave pixels where they are."""

from functools import partial
from typing import Literal

import torch
from pydantic import Field, PositiveFloat

from nldist.data.augment import photometric
from nldist.data.augment.frame import Frame, Op, Span, filled
from nldist.data.augment.photometric import Kernel, apply_stages
from nldist.data.draws import Draws

JITTERS: tuple[Kernel | None, ...] = (
    photometric.brightness,
    photometric.contrast,
    photometric.saturation,
    photometric.hue,
    None,
)
UNCHANGED = len(JITTERS) - 1


class ColorJitter(Op):
    """Change brightness, contrast, saturation and hue by random amounts, in a random order for each image."""

    op: Literal["color_jitter"] = "color_jitter"
    brightness: float = Field(default=0.0, ge=0, description="The factor is uniform in max(0, 1 - x) to 1 + x.")
    contrast: float = Field(default=0.0, ge=0, description="The factor is uniform in max(0, 1 - x) to 1 + x.")
    saturation: float = Field(default=0.0, ge=0, description="The factor is uniform in max(0, 1 - x) to 1 + x.")
    hue: float = Field(default=0.0, ge=0, le=0.5, description="The shift is uniform in -x to x, of a whole circle.")
    p: float = Field(default=1.0, ge=0, le=1, description="Probability of changing an image at all.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Sampling as torchvision's ColorJitter, inside RandomApply."""
        frame = filled(frame, self.op)
        spreads = (self.brightness, self.contrast, self.saturation)
        ranges = [(max(0.0, 1 - spread), 1 + spread) for spread in spreads] + [(-self.hue, self.hue)]
        magnitudes = torch.stack([rng.between(low, high) for low, high in ranges], dim=1)
        order = rng.uniform(len(ranges)).argsort(dim=1, stable=True)
        is_used = torch.tensor([spread > 0 for spread in (*spreads, self.hue)], device=order.device)
        kinds = torch.where(is_used[order] & rng.chance(self.p)[:, None], order, UNCHANGED)
        return frame.with_pixels(apply_stages(frame.pixels, kinds, magnitudes.gather(1, order), JITTERS))


class Greyscale(Op):
    """Make an image grey (three equal channels)."""

    op: Literal["greyscale"] = "greyscale"
    p: float = Field(ge=0, le=1, description="Probability of making an image grey.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """Luma of the chosen images."""
        grey = photometric.greyscale(frame.pixels)
        return frame.with_pixels(torch.where(rng.chance(self.p)[:, None, None, None], grey, frame.pixels))


class Blur(Op):
    """Gaussian blur, with a kernel of about a tenth of the image's short side."""

    op: Literal["blur"] = "blur"
    sigma: Span[PositiveFloat] = Field(default=(0.1, 2.0), description="Range of the standard deviation, in pixels.")
    p: float = Field(ge=0, le=1, description="Probability of blurring an image.")

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """A sigma of its own for each chosen image (SimCLR, appendix A)."""
        frame = filled(frame, self.op)
        radius = max(1, min(frame.pixels.shape[2:]) // 20)
        sigmas = rng.between(*self.sigma)
        kinds = rng.chance(self.p).long()
        kernels = (None, partial(photometric.blur, radius=radius))
        return frame.with_pixels(apply_stages(frame.pixels, kinds[:, None], sigmas[:, None], kernels))
