"""SANM's masks (Tu et al., CVPR 2023; docs/sanm.md): where, how large, and what they leave of the target."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nldist.data.draws import Draws

_TRIES = 16  # draws of a rectangle's aspect, of which the first that fits into the image is taken
_ASPECTS = (0.8, 1.25)
_ROUNDING = 1e-3  # of a step of saliency, by which a value may miss it


def saliency(maps: Float[Tensor, "b channels h w"], size: Sequence[int]) -> Float[Tensor, "b H W"]:
    """Where the network looks, in 256 steps: the squared feature map, as large as the image.

    Enlarging makes a plateau of a value at the edge, whose pixels differ by rounding: all of them reach its step, so
    that the peak is the same pixel on every processor.

    Args:
        maps: (b, channels, h, w), of the last layer.
        size: height H and width W of the image.

    Returns:
        (b, H, W), whole numbers of 0 to 255.
    """
    squares = maps.square().sum(1, keepdim=True)
    large = F.interpolate(squares, tuple(size), mode="bilinear", align_corners=False)[:, 0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    return (255 * (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny) + _ROUNDING).floor()


def extremes(saliency: Float[Tensor, "b H W"]) -> tuple[Int[Tensor, "b 2"], Int[Tensor, "b 2"]]:
    """The first places (row, column) of the greatest and of the least value, in raster order: int64 (b, 2) each."""
    flat, width = saliency.flatten(1), saliency.shape[2]
    places = (flat.argmax(1), flat.argmin(1))  # torch documents: the first of several
    peak, trough = (torch.stack([place // width, place % width], dim=1) for place in places)
    return peak, trough


def mask(
    images: Float[Tensor, "b 3 H W"], corner: Int[Tensor, "b 2"], area: Float[Tensor, " b"], draws: Draws
) -> Float[Tensor, "b 3 H W"]:
    """The images with a rectangle each (equation 5), filled with one drawn number in [0, 1) per channel.

    Args:
        images: (b, 3, H, W), normalised.
        corner: int64 (b, 2), row and column of the rectangle's top left corner; it is moved to lie within the image.
        area: (b,), of the rectangle as a share of the image's.
        draws: of its aspect, height to width, uniform in [0.8, 1.25), drawn again where it does not fit; and of the
            filling.

    Returns:
        (b, 3, H, W).
    """
    height, width = images.shape[-2:]
    sides = rectangle(area, draws.uniform(_TRIES), (height, width))
    filling = draws.uniform(images.shape[1]).to(images)[:, :, None, None]
    rows, columns = (_within(*axis) for axis in zip(corner.T, sides.T, (height, width), strict=True))
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], filling, images)


def _within(first: Int[Tensor, " b"], length: Int[Tensor, " b"], size: int) -> Bool[Tensor, "b {size}"]:
    """Which of `size` places are the `length` (b,) ones from `first` (b,) on, moved to lie within: bool (b, size)."""
    start, places = torch.minimum(first, size - length)[:, None], torch.arange(size, device=first.device)
    return (places >= start) & (places < start + length[:, None])


def rectangle(area: Float[Tensor, " b"], draws: Float[Tensor, "b tries"], size: Sequence[int]) -> Int[Tensor, "b 2"]:
    """Height and width in pixels, int64 (b, 2), by the first drawn aspect whose rectangle fits into the image.

    Where none does, as of an area near the whole image, it is cut off at the image's edge.

    Args:
        area: (b,), as a share of the image's.
        draws: (b, tries), uniform in [0, 1).
        size: of the image.
    """
    limits = torch.tensor(size, device=draws.device)
    aspect = _ASPECTS[0] + (_ASPECTS[1] - _ASPECTS[0]) * draws
    pixels = (area.double() * limits.prod())[:, None]
    sides = torch.stack([(pixels * aspect).sqrt(), (pixels / aspect).sqrt()], dim=2).round().long()
    first = (sides <= limits).all(2).int().argmax(1)  # 0 where none fits
    return sides[torch.arange(len(sides), device=draws.device), first].minimum(limits)


def lower(targets: Float[Tensor, "b C"], ratio: Float[Tensor, " b"]) -> Float[Tensor, "b C"]:
    """Targets (b, C) of masked images (equation 7): the greatest entry loses `ratio` (b,) to all others alike."""
    num_classes, ratio = targets.shape[1], ratio.to(targets)[:, None]
    top = F.one_hot(targets.argmax(1), num_classes).bool()
    return torch.where(top, targets - ratio, targets + ratio / (num_classes - 1))
