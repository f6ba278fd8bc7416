"""What travels through the ops of a view, and what an op is."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor

from nldist.data.augment import sampling
from nldist.data.draws import Draws
from nldist.errors import UserError

Number = TypeVar("Number", int, float)


def _ordered(span: tuple[Number, Number]) -> tuple[Number, Number]:
    if span[0] > span[1]:
        raise ValueError(f"a range is [low, high], not {list(span)}")
    return span


Span = Annotated[tuple[Number, Number], AfterValidator(_ordered)]
"""A range [low, high] in a setting."""


@dataclass(frozen=True)
class Frame:
    """A batch of images on its way through a view.

    Pixels stay uint8 between ops, as in the references' image pipelines, and are normalised once at the end.
    """

    pixels: Tensor
    """uint8 (b, 3, H, W); what lies outside an image's own size is padding and never reaches a result."""
    sizes: Tensor
    """int64 (b, 2): own height and width of each image in `pixels`."""
    same_size: bool = False
    """Every image is known to fill `pixels`: true behind the first op that gives all images one size."""
    resized: Tensor | None = None
    """int64 (b, 2): sizes that a resize has asked for; the next crop does both in one interpolation."""
    max_step: float = 1.0
    """Upper bound of the source pixels per pixel of the resized images."""
    hidden: Tensor | None = None
    """bool (b, 1, H, W): pixels that become zero behind the normalisation (cutout)."""

    def with_pixels(self, pixels: Tensor) -> "Frame":
        """The same frame with other pixels of the same shape."""
        return replace(self, pixels=pixels)

    @property
    def view_sizes(self) -> Tensor:
        """int64 (b, 2): height and width of each image as the next op sees it."""
        return self.sizes if self.resized is None else self.resized

    @property
    def step(self) -> Tensor:
        """float64 (b, 2): source pixels per pixel that the next op sees."""
        return self.sizes.double() / self.view_sizes


def filled(frame: Frame, op: str) -> Frame:
    """The frame with every image filling it, as ops that look at whole images need.

    Raises:
        UserError: images of several sizes reach the op.
    """
    if frame.same_size:
        return frame
    sizes = frame.view_sizes
    height, width = sizes[0].tolist() if len(sizes) else frame.pixels.shape[2:]
    is_full = frame.resized is not None or (height, width) == tuple(frame.pixels.shape[2:])
    if not is_full or not bool((sizes == sizes[:1]).all()):
        raise UserError(
            f"images of several sizes reach {op} of a view: put pad_crop, random_crop, center_crop or "
            "random_resized_crop before it"
        )
    if frame.resized is None:
        return replace(frame, same_size=True)
    bounds = torch.stack([torch.zeros_like(frame.sizes), frame.sizes], dim=2)
    start = torch.zeros_like(frame.step)
    max_step = (frame.max_step, frame.max_step)
    pixels = sampling.resample(frame.pixels, start, frame.step, bounds, max_step, (height, width))
    return Frame(pixels, sizes, same_size=True)


class Op(BaseModel):
    """One step of a view: its settings, and what it does to a frame."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hides: ClassVar[bool] = False
    """Whether the op marks pixels by their place, so that no op may move pixels behind it."""

    def apply(self, frame: Frame, rng: Draws) -> Frame:
        """The frame after this op; each random decision comes from the sample's own stream in `rng`."""
        raise NotImplementedError
