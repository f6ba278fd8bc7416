"""Pixels of a batch at per-sample places: whole pixels, antialiased boxes, affine maps.

Everything is a sum over taps of gathered pixels, in a fixed order for each sample, so that a result does not
depend, bit for bit, on the other samples of the batch.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Interpolation = Literal["nearest", "bilinear"]

# Values that `resample` has in work at a time: what a core's cache holds, and what is little of a GPU's memory.
CHUNK_ON_CPU = 2**18
CHUNK_ON_GPU = 2**27


def take(pixels: Tensor, sizes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels at whole-number places, zero outside an image's own size.

    Args:
        pixels: uint8 (b, 3, H, W).
        sizes: int64 (b, 2), own height and width of each image.
        rows, columns: int64, broadcastable to (b, h, w).

    Returns:
        uint8 (b, 3, h, w).
    """
    height, width = sizes[:, :, None, None].unbind(1)
    inside = ((rows >= 0) & (rows < height)) & ((columns >= 0) & (columns < width))
    index = rows.clamp(0, pixels.shape[2] - 1) * pixels.shape[3] + columns.clamp(0, pixels.shape[3] - 1)
    taken = pixels.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, pixels.shape[1], -1))
    return taken.view(*pixels.shape[:2], *index.shape[1:]) * inside[:, None]


def crop(pixels: Tensor, sizes: Tensor, corners: Tensor, size: int) -> Tensor:
    """Crops uint8 (b, 3, size, size) with their top left at `corners`, int64 (b, 2), maybe negative; else as `take`."""
    batch, channels, height, width = pixels.shape
    places = corners[:, :, None] + torch.arange(size, device=pixels.device)
    rows, columns = ((places >= 0) & (places < sizes[:, :, None])).unbind(1)
    # Each line of a crop is one run of bytes; what such a run holds of other lines is blanked by the mask.
    flat, run = pixels.permute(0, 2, 3, 1).reshape(-1), size * channels
    lines = torch.arange(batch, device=pixels.device)[:, None] * height + places[:, 0].clamp(0, height - 1)
    starts = (lines * width + corners[:, 1, None].clamp(-size, width)) * channels
    # Only asked on a CPU, where the answer costs nothing and saves two copies.
    inside = batch > 0 and pixels.device.type == "cpu" and bool(rows.all() & columns.all())
    if not inside:
        flat, starts = F.pad(flat, (run, run)), starts + run
    taken = flat.unfold(0, run, 1).index_select(0, starts.flatten())
    taken = taken.view(batch, size, size, channels).permute(0, 3, 1, 2)
    return taken if inside else taken * (rows[:, :, None] & columns[:, None, :])[:, None]


def resample(
    pixels: Tensor,
    start: Tensor,
    step: Tensor,
    bounds: Tensor,
    max_step: tuple[float, float],
    size: tuple[int, int],
) -> Tensor:
    """Boxes of the images, scaled to one size with an antialiasing triangle filter (Pillow's bilinear).

    Args:
        pixels: uint8 (b, 3, H, W).
        start: float64 (b, 2), top and left edge of each box, in source pixels.
        step: float64 (b, 2), source pixels per output pixel.
        bounds: int64 (b, 2, 2), for each axis the first source pixel that may be looked at, and the first
            that may not; output pixels whose centre lies outside are zero.
        max_step: upper bound of `step` on each axis: fixes the number of taps without asking the device.
        size: height and width of the result.

    Returns:
        uint8 (b, 3, *size).
    """
    taps = [
        tap
        for axis in (0, 1)
        for tap in _taps(start[:, axis], step[:, axis], bounds[:, axis], max_step[axis], size[axis])
    ]
    budget = CHUNK_ON_CPU if pixels.device.type == "cpu" else CHUNK_ON_GPU
    chunk = max(1, budget // max(1, pixels[:1, :, :1].numel() * max(size[0], pixels.shape[2])))
    parts = []
    for part, rows, row_weights, columns, column_weights in zip(
        *(torch.split(tensor, chunk) for tensor in (pixels, *taps)), strict=True
    ):
        tall = _mix_lines(part, rows, row_weights).transpose(2, 3)
        parts.append(_mix_lines(tall, columns, column_weights).transpose(2, 3).round().clamp_(0, 255))
    return torch.cat(parts).to(torch.uint8)


def _taps(start: Tensor, step: Tensor, bounds: Tensor, max_step: float, size: int) -> tuple[Tensor, Tensor]:
    """Source lines of each output line on one axis, and their weights: int64, float32 (b, num_taps, size)."""
    low, high = bounds[:, :1, None], bounds[:, 1:, None]
    places = torch.arange(size, device=start.device) + 0.5
    centres = start[:, None, None] + places * step[:, None, None]
    support = step[:, None, None].clamp(min=1.0)
    num_taps = math.ceil(2 * max(max_step, 1.0))
    lines = (centres - support + 0.5).floor().long() + torch.arange(num_taps, device=start.device)[:, None]
    seen = (lines >= low) & (lines < high) & (centres >= low) & (centres < high)
    weights = (1 - (lines + 0.5 - centres).abs() / support).clamp(min=0) * seen
    total = sum(weights.unbind(1), torch.zeros_like(centres[:, 0])).clamp(min=1e-6)
    return torch.minimum(lines.clamp(min=0), high - 1), (weights / total[:, None]).float()


def _mix_lines(values: Tensor, lines: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of lines: (b, c, H, W) of any type -> float32 (b, c, size, W)."""
    batch, channels, height, width = values.shape
    planes = torch.arange(batch * channels, device=values.device).view(batch, channels, 1) * height
    source = values.reshape(-1, width)
    mixed = torch.zeros(batch, channels, lines.shape[2], width, device=values.device)
    for line, weight in zip(lines.unbind(1), weights.unbind(1), strict=True):
        taken = source.index_select(0, (planes + line[:, None]).flatten()).view_as(mixed)
        mixed.add_(taken.float().mul_(weight[:, None, :, None]))
    return mixed


def affine(
    pixels: Tensor, sizes: Tensor, matrix: Tensor, offset: Tensor, interpolation: Interpolation = "nearest"
) -> Tensor:
    """Images under an affine map, zero outside.

    Args:
        pixels: uint8 (b, 3, H, W).
        sizes: int64 (b, 2), own height and width of each image.
        matrix: (b, 2, 2), from output places (x, y), relative to the image's own middle, to source places.
        offset: (b, 2), added to the source places.
        interpolation: of the source's pixels.

    Returns:
        uint8 (b, 3, H, W).
    """
    matrix, offset = matrix.float(), offset.float()
    middle = (sizes.flip(1) - 1).float() / 2
    x = torch.arange(pixels.shape[3], device=pixels.device) - middle[:, :1]
    y = torch.arange(pixels.shape[2], device=pixels.device) - middle[:, 1:]
    columns, rows = (
        (matrix[:, axis, 0, None] * x)[:, None, :]
        + ((matrix[:, axis, 1, None] * y) + (offset + middle)[:, axis, None])[:, :, None]
        for axis in (0, 1)
    )
    if interpolation == "nearest":
        return take(pixels, sizes, rows.round().long(), columns.round().long())
    return _bilinear(pixels, sizes, rows, columns)


def _bilinear(pixels: Tensor, sizes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top)[:, None], (columns - left)[:, None]
    out = torch.zeros(1, device=pixels.device)
    for dy, row_weight in ((0, 1 - down), (1, down)):
        for dx, column_weight in ((0, 1 - right), (1, right)):
            corner = take(pixels, sizes, top.long() + dy, left.long() + dx)
            out = out + corner * (row_weight * column_weight)
    return out.round().clamp(0, 255).to(torch.uint8)
