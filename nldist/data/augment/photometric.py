"""Colour operations on a batch, each image with its own magnitude, as torchvision's uint8 operations.

A kernel takes images uint8 (n, 3, H, W) and magnitudes float64 (n,) and gives uint8 (n, 3, H, W).

They are written out here, bit for bit: torchvision itself takes seconds to import, in each process.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]


def apply_stages(pixels: Tensor, kinds: Tensor, magnitudes: Tensor, kernels: Sequence[Kernel | None]) -> Tensor:
    """Run each image through its own sequence of kernels.

    Args:
        pixels: uint8 (b, 3, H, W), left as it is.
        kinds: int64 (b, num_stages), which kernel each image meets in each stage.
        magnitudes: float64 (b, num_stages), with which magnitude.
        kernels: by kind; None leaves the image alone.

    Returns:
        uint8 (b, 3, H, W).
    """
    pixels = pixels.clone()
    grouped = kinds.argsort(dim=0, stable=True)
    kind_range = torch.arange(len(kernels), device=kinds.device)
    counts = (kinds[:, :, None] == kind_range).sum(0).tolist()  # the only question to the device
    for stage, stage_counts in enumerate(counts):
        chunks = torch.split(grouped[:, stage], stage_counts)
        for kernel, members in zip(kernels, chunks, strict=True):
            if kernel is not None and len(members):
                pixels[members] = kernel(pixels[members], magnitudes[members, stage])
    return pixels


def brightness(pixels: Tensor, factors: Tensor) -> Tensor:
    """Blend with black."""
    return _blend(pixels, torch.zeros(1, device=pixels.device), factors)


def contrast(pixels: Tensor, factors: Tensor) -> Tensor:
    """Blend with the mean of the grey image."""
    grey = greyscale(pixels).float()
    # Summed as integers: exact, so that the other images of the batch cannot change the last bit.
    mean = grey.long().sum(dim=(1, 2, 3), keepdim=True).double() / grey[0].numel()
    return _blend(pixels, mean.float(), factors)


def saturation(pixels: Tensor, factors: Tensor) -> Tensor:
    """Blend with the grey image ("color" in the policies)."""
    return _blend(pixels, greyscale(pixels).float(), factors)


def sharpness(pixels: Tensor, factors: Tensor) -> Tensor:
    """Blend with a 3 x 3 smoothing (weight 5 in the middle, 1 around) of all but the border."""
    if min(pixels.shape[2:]) <= 2:
        return pixels
    wide = pixels.int()
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = pixels.float()
    smooth[:, :, 1:-1, 1:-1] = ((around + 4 * wide[:, :, 1:-1, 1:-1]).float() / 13).round()
    return _blend(pixels, smooth, factors)


def hue(pixels: Tensor, shifts: Tensor) -> Tensor:
    """Shift the hue by a share of the colour circle, in -0.5 to 0.5."""
    r, g, b = (pixels.float() / 255).unbind(1)
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    divisor = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == r, (g - b) / divisor, torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    )
    sector = sector + 6 * _column(shifts)[:, 0]
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(sector + offset, 6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return (torch.stack(channels, dim=1) * 255.999).to(torch.uint8)


def posterize(pixels: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest bits (whole numbers, 0 to 8) of each value."""
    masks = 256 - 2 ** (8 - bits.long())
    return pixels & masks.to(torch.uint8)[:, None, None, None]


def solarize(pixels: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the values at or above the threshold, in 0 to 256."""
    return torch.where(pixels >= _column(thresholds), ~pixels, pixels)


def autocontrast(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Stretch each channel to the whole range."""
    values = pixels.float()
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    flat = low == high
    low, scale = low.masked_fill(flat, 0), ((high - low) * (1 / 255)).masked_fill(flat, 1)
    return ((values - low) / scale).clamp(0, 255).to(torch.uint8)


def equalize(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Flatten the histogram of each channel, with Pillow's rounding."""
    values = pixels.flatten(2).long()
    counts = values.new_zeros((*values.shape[:2], 256))
    counts.scatter_add_(2, values, values.new_ones(1).expand_as(values))
    brightest = values.amax(dim=2, keepdim=True)
    step = (values.shape[2] - counts.gather(2, brightest)) // 255
    below = counts.cumsum(2) - counts  # pixels that are darker than each value
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255).to(torch.uint8)
    return torch.where(step[..., None] > 0, table.gather(2, values).view_as(pixels), pixels)


def invert(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """255 minus the value."""
    return ~pixels


def blur(pixels: Tensor, sigmas: Tensor, radius: int) -> Tensor:
    """Gaussian blur with a kernel of 2 * radius + 1 pixels, reflected at the border."""
    taps = torch.arange(-radius, radius + 1, device=pixels.device)
    weights = torch.exp(-0.5 * (taps / sigmas[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).float()
    values = F.pad(pixels.float(), (radius,) * 4, mode="reflect")
    for dim in (2, 3):
        length = pixels.shape[dim]
        shifted = (values.narrow(dim, tap, length) * _column(weights[:, tap]) for tap in range(2 * radius + 1))
        total = next(shifted)
        for part in shifted:
            total += part
        values = total
    return values.round_().clamp_(0, 255).to(torch.uint8)


def greyscale(pixels: Tensor) -> Tensor:
    """Luma rounded down: uint8 (n, 1, H, W)."""
    r, g, b = torch.split(pixels, 1, dim=1)
    return r.mul(0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114).to(torch.uint8)


def _blend(pixels: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    # This form leaves a pixel that equals the other one as it is, whatever the rounding.
    return (pixels + (other - pixels) * _column(1 - factors)).clamp_(0, 255).to(torch.uint8)


def _column(values: Tensor) -> Tensor:
    return values.float()[:, None, None, None]
