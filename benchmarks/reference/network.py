"""PreAct-ResNet-18 with DivideMix's shortcuts (docs/dividemix.md), and two linear heads."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """bn-relu-conv twice, plus the first activation, or a 1 x 1 convolution of it."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> (b, channels, h / stride, w / stride)."""
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return torch.add(out, shortcut)


class Backbone(nn.Module):
    """From normalised images (b, 3, h, w) to pooled features (b, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = [64, 64, 128, 256, 512]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Block(before, width, 2 if stage else 1), Block(width, width, 1))
                for stage, (before, width) in enumerate(itertools.pairwise(widths))
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features."""
        return self.stages(F.relu(self.bn1(self.conv1(images)))).mean((2, 3))  # type: ignore[no-any-return]


class TwoHeads(nn.Module):
    """A classifier; and ScanMix's second head, for clusters. Its weights have nldist's names."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head, self.cluster_head = nn.Linear(512, num_classes), nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """The classifier's logits (b, C)."""
        return self.head(self.backbone(images))  # type: ignore[no-any-return]

    def clusters(self, images: Tensor) -> Tensor:
        """The second head's logits (b, C)."""
        return self.cluster_head(self.backbone(images))  # type: ignore[no-any-return]
