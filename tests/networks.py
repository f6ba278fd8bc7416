"""Small modules in the place of networks."""

from typing import Any

from torch import Tensor, nn


class Plain(nn.Module):
    """What an engine trains, around any module: whatever is asked for is its output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *calls: tuple[Any, ...], backbone: str = "learns") -> list[Tensor]:
        return [self.module(images) for images, *_ in calls]


class Flat(nn.Sequential):
    """A backbone whose features are its output."""

    def forward_features(self, images: Tensor) -> Tensor:
        return self(images)  # type: ignore[no-any-return]

    def forward_head(self, maps: Tensor, pre_logits: bool = True) -> Tensor:
        return maps
