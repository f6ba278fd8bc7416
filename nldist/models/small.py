"""A small convolutional network that trains on CPUs, for images from 8 x 8 to 32 x 32."""

import torch
from torch import nn

from nldist.models.resnet_cifar import init_convolutions


def _stage(in_channels: int, out_channels: int, *, downsample: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if downsample else []
    for channels in (in_channels, out_channels):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class SmallCNN(nn.Module):
    """Three stages of two 3 x 3 convolutions with batch norm and ReLU, halved between, mean-pooled."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        first, second, third = widths
        self.stages = nn.Sequential(
            _stage(3, first, downsample=False),
            _stage(first, second, downsample=True),
            _stage(second, third, downsample=True),
        )
        self.num_features = third
        init_convolutions(self)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The last feature map (b, num_features, h / 4, w / 4) of images (b, 3, h, w), h and w at least 4."""
        maps: torch.Tensor = self.stages(images)
        return maps

    def forward_head(self, maps: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        """Pooled features (b, num_features)."""
        return maps.mean(dim=(2, 3))
