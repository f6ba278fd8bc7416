"""Residual networks with the CIFAR stem: 3 x 3, stride 1, no max-pooling.

With `BasicBlock` it is the post-activation network (He et al. 2016a); with `PreActBlock` the pre-activation
one (He et al. 2016b) in the variant that DivideMix trains, which differs from theirs in three places: batch norm and
ReLU right after the stem, none before the pooling, and shortcuts that carry the activated input
(docs/dividemix.md, "Where paper and code differ").
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

STAGE_WIDTHS = (64, 128, 256, 512)


class _Conv2d(nn.Conv2d):
    """A convolution without a bias.

    Of small maps of many channels oneDNN's float32 kernels for its own layout, which plain tensors get, are faster than
    those for channels last (benchmarks/dividemix_step.py measures whole steps).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See nn.Conv2d."""
        if self.out_channels < STAGE_WIDTHS[-1] or x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        plain = x.contiguous()
        if plain is not x and plain.requires_grad:
            # Or all layers before it would have gradients in the wrong layout.
            plain.register_hook(_channels_last)  # type: ignore[no-untyped-call]
        out: torch.Tensor = self._conv_forward(plain, self.weight.contiguous(), None)
        return out


def _channels_last(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.contiguous(memory_format=torch.channels_last)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return _Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def init_convolutions(model: nn.Module) -> None:
    """Draw all convolutions from a normal distribution of variance 2 / fan-out (He et al. 2015, section 2.2)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


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
                _Conv2d(in_channels, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in_channels, h, w) -> (b, channels, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)).add_(self.shortcut(x)), inplace=True)


class PreActBlock(nn.Module):
    """bn-relu-conv twice, plus the first activation, or a bare 1 x 1 convolution of it."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = _conv3x3(channels, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = _Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in_channels, h, w) -> (b, channels, h / stride, w / stride)."""
        activated = F.relu(self.bn1(x), inplace=True)
        out: torch.Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        return out.add_(self.shortcut(activated))


class ResNetCIFAR(nn.Module):
    """Stem (conv-bn-relu), four stages of blocks at strides 1, 2, 2, 2, mean pooling.

    Args:
        block: what the stages are made of.
        num_blocks: of each stage.
        kaiming: begin from normally distributed convolutions of variance 2 / fan-out (He et al. 2015, section 2.2),
            not from torch's default.
    """

    def __init__(
        self, block: type[BasicBlock] | type[PreActBlock], num_blocks: Sequence[int], *, kaiming: bool = False
    ) -> None:
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
        if kaiming:
            init_convolutions(self)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """The last feature map (b, 512, h / 8, w / 8) of images (b, 3, h, w)."""
        maps: torch.Tensor = self.stages(F.relu(self.bn1(self.conv1(images)), inplace=True))
        return maps

    def forward_head(self, maps: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        """Pooled features (b, 512)."""
        return maps.mean(dim=(2, 3))
