"""Residual networks with the CIFAR stem: 3 x 3, stride 1, no max-pooling.

With `BasicBlock` it is the post-activation network (He et al. 2016a); with `PreActBlock` the pre-activation
one (He et al. 2016b), in the variant that DivideMix trains: batch norm and ReLU right after the stem, none
before the pooling (algorithms 2.c).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

STAGE_WIDTHS = (64, 128, 256, 512)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """conv-bn-relu, conv-bn, plus the shortcut, then ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in_channels, h, w) -> (b, channels, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """bn-relu-conv twice, plus the input or a bare 1 x 1 convolution of the first activation."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in_channels, h, w) -> (b, channels, h / stride, w / stride)."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return torch.add(out, shortcut)


class ResNetCIFAR(nn.Module):
    """Stem (conv-bn-relu), four stages of blocks at strides 1, 2, 2, 2, mean pooling."""

    def __init__(self, block: type[BasicBlock] | type[PreActBlock], num_blocks: Sequence[int]) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, STAGE_WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        stages: list[nn.Module] = []
        in_channels = STAGE_WIDTHS[0]
        for stage, (channels, count) in enumerate(zip(STAGE_WIDTHS, num_blocks, strict=True)):
            blocks: list[nn.Module] = []
            for position in range(count):
                blocks.append(block(in_channels, channels, stride=2 if stage and not position else 1))
                in_channels = channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.num_features = STAGE_WIDTHS[-1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (b, 512) of images (b, 3, h, w)."""
        maps: torch.Tensor = self.stages(F.relu(self.bn1(self.conv1(images))))
        return maps.mean(dim=(2, 3))
