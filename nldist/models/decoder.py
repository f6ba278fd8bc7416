"""The decoder of masked reconstruction (SANM, equation 10; docs/sanm.md)."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

# Of the authors' networks, by the sides of feature map and image: kernel, stride and output padding of each layer.
_PUBLISHED = {
    (4, 32): ((4, 2, 0), (6, 1, 0), (4, 2, 0)),
    (7, 224): ((6, 3, 1), (2, 3, 1), (2, 3, 0)),
}
_CHANNELS = (256, 128, 3)


class Decoder(nn.Sequential):
    """Three transposed convolutions, with nothing between them, from a feature map to the image.

    For networks that the authors do not have, each layer enlarges by a factor of its own, and the result is resized
    where the product of the factors is not that of the sides.

    Args:
        num_channels: of the feature map.
        map_side: its height and width.
        image_side: those of the image.
    """

    def __init__(self, num_channels: int, map_side: int, image_side: int) -> None:
        self.image_side = image_side
        layers = _PUBLISHED.get((map_side, image_side)) or _layers(image_side / map_side)
        channels = zip((num_channels, *_CHANNELS), _CHANNELS, layers, strict=False)
        super().__init__(*(nn.ConvTranspose2d(a, b, k, s, output_padding=p) for a, b, (k, s, p) in channels))

    def forward(self, maps: Tensor) -> Tensor:
        """Images (b, 3, side, side) of feature maps (b, channels, h, w), at least float32."""
        images: Tensor = super().forward(maps)  # type: ignore[no-untyped-call]
        if images.shape[-1] == images.shape[-2] == self.image_side:
            return images
        return F.interpolate(images, (self.image_side, self.image_side), mode="bilinear", align_corners=False)


def _layers(ratio: float) -> tuple[tuple[int, int, int], ...]:
    """Three layers that enlarge `ratio` times or a little more."""
    strides = []
    for left in (3, 2, 1):
        strides.append(max(1, math.ceil(ratio ** (1 / left) - 1e-9)))
        ratio /= strides[-1]
    return tuple((stride, stride, 0) for stride in strides)
