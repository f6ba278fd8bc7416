"""Views of a batch: augmentation and normalisation of decoded images, on the device that they are on."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from nldist.data.augment.colour import Blur, ColorJitter, Greyscale
from nldist.data.augment.frame import Frame, Op, filled
from nldist.data.augment.policies import AutoAugmentCIFAR10, RandAugment, StrongOurs
from nldist.data.augment.spatial import (
    Affine,
    CenterCrop,
    Cutout,
    Flip,
    PadCrop,
    RandomCrop,
    RandomResizedCrop,
    Resize,
)
from nldist.data.draws import DrawSource
from nldist.errors import UserError

ViewOp = Annotated[
    PadCrop
    | RandomCrop
    | CenterCrop
    | Resize
    | RandomResizedCrop
    | Flip
    | Affine
    | ColorJitter
    | Greyscale
    | Blur
    | RandAugment
    | AutoAugmentCIFAR10
    | StrongOurs
    | Cutout,
    Field(discriminator="op"),
]


class View:
    """A sequence of ops, then normalisation.

    Args:
        ops: what is done to the images, in order.
        mean: of each channel, for pixels in [0, 1].
        std: of each channel.

    Raises:
        UserError: an op stands behind one that must be last.
    """

    def __init__(self, ops: Sequence[Op], mean: Sequence[float], std: Sequence[float]) -> None:
        for op in ops[:-1]:
            if op.hides:
                name = getattr(op, "op", type(op).__name__)
                raise UserError(f"{name} blanks pixels behind the normalisation: make it the last op of its view")
        self.ops = tuple(ops)
        means, stds = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        self._scale = 1 / (255 * stds)
        self._shift = -means / stds

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor, draws: Tensor, key: Sequence[int]) -> Tensor:
        """Make this view of a batch.

        Args:
            images: uint8 (b, 3, H, W), RGB, each in the top left corner.
            sizes: int64 (b, 2), own height and width of each image.
            draws: int64 (b,), one id per occurrence of a sample in the epoch.
            key: integers that name this view of this epoch: (seed, epoch, view number, ...).

        Returns:
            float32 (b, 3, h, w), normalised; each depends on its own pixels, size and draw, and on the key.

        Raises:
            UserError: the images have several sizes where an op, or the result, needs one.
        """
        source = DrawSource(key, draws)
        frame = Frame(images, sizes)
        for position, op in enumerate(self.ops):
            frame = op.apply(frame, source.at(position))
        return self._normalised(filled(frame, "the end"))

    def _normalised(self, frame: Frame) -> Tensor:
        device = frame.pixels.device
        self._scale, self._shift = self._scale.to(device), self._shift.to(device)
        # Channels last, with whole lines as rows: vectors as long as a line, not as three channels.
        lines = frame.pixels.permute(0, 2, 3, 1).float().flatten(2)
        width = frame.pixels.shape[3]
        scale, shift = (values.flatten().repeat(width) for values in (self._scale, self._shift))
        values = lines.mul_(scale).add_(shift).view(*lines.shape[:2], width, 3).permute(0, 3, 1, 2)
        return values if frame.hidden is None else values.masked_fill_(frame.hidden, 0)
