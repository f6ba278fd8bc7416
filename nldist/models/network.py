"""A network: a backbone and named heads."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nldist.dist.engine import Backbone, Call

# Heads in weights files.
_ATTRIBUTES = {"classify": "head", "cluster": "cluster_head", "project": "projector", "reconstruct": "decoder"}
_OF_MAPS = {"maps", "reconstruct"}  # outputs that need no pooled features
_OLD_KEYS = (("classifier.", ""), ("heads.", "cluster_head."))  # beginnings that nldist 0.1 wrote in checkpoints

# Gives the logits (b, C) of normalised images (b, 3, h, w).
Predictor = Callable[[Tensor], Tensor]


class Network(nn.Module):
    """A backbone and named heads on its features.

    The outputs that can be asked for: a head's name; "features", the pooled ones; "maps", the last feature map.

    Args:
        backbone: with timm's two methods: forward_features(images) gives maps, forward_head(maps, pre_logits=True)
            pooled features (b, num_features).
        num_features: F.
        heads: by name, each (b, F) -> (b, ...); but "reconstruct", of the last feature map.
    """

    def __init__(self, backbone: nn.Module, num_features: int, **heads: nn.Module) -> None:
        super().__init__()
        self.backbone, self.num_features = backbone, num_features
        self.register_load_state_dict_pre_hook(_rename_old_keys)  # type: ignore[no-untyped-call]
        for name, head in heads.items():
            self.add(name, head)

    def add(self, name: str, head: nn.Module) -> "Network":
        """The network with one more head."""
        setattr(self, _ATTRIBUTES[name], head)
        return self

    def drop(self, name: str) -> "Network":
        """The network without a head."""
        delattr(self, _ATTRIBUTES[name])
        return self

    @property
    def heads(self) -> dict[str, Any]:
        """Its heads by name."""
        return {name: getattr(self, attribute) for name, attribute in _ATTRIBUTES.items() if hasattr(self, attribute)}

    def forward(self, *calls: Call, backbone: Backbone = "learns") -> list[Tensor]:
        """The outputs that each call asks for, in their order; calls are forwards one after the other.

        So batch norm has the statistics of each call's images alone, and its running averages follow each.

        Args:
            calls: (images, output, output, ...), images normalised (b, 3, h, w).
            backbone: what becomes of it.
        """
        return [output for images, *names in calls for output in self._outputs(images, names, backbone)]

    def _outputs(self, images: Tensor, names: list[str], backbone: Backbone) -> list[Tensor]:
        mode = self.backbone.training
        if backbone == "stays":
            self.backbone.eval()  # its statistics, too
        with torch.set_grad_enabled(torch.is_grad_enabled() and backbone == "learns"):
            maps = self.backbone.forward_features(images)  # type: ignore[operator]
            features = None
            if set(names) - _OF_MAPS:
                features = self.backbone.forward_head(maps, pre_logits=True)  # type: ignore[operator]
        if backbone == "stays":
            self.backbone.train(mode)
        own = {"maps": maps, "features": features}
        return [own[name] if name in own else self.heads[name](own[_source(name)]) for name in names]

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (b, F) of normalised images (b, 3, h, w)."""
        return self.forward((images, "features"))[0]

    def logits(self, images: Tensor) -> Tensor:
        """Logits (b, C) of normalised images (b, 3, h, w)."""
        return self.forward((images, "classify"))[0]

    def classifier_state(self) -> dict[str, Tensor]:
        """The state of its backbone and its head "classify" alone: what weights files hold."""
        return {key: value for key, value in self.state_dict().items() if key.startswith(("backbone.", "head."))}


class Projector(nn.Sequential):
    """Linear-ReLU-Linear from F features to `dim` on the unit sphere (SimCLR, section 2.1; MoCo-v2, section 3)."""

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__(nn.Linear(num_features, num_features), nn.ReLU(inplace=True), nn.Linear(num_features, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Projections (b, dim) of length 1, at least float32 also under autocast."""
        projections: Tensor = super().forward(features)  # type: ignore[no-untyped-call]
        return F.normalize(projections.to(torch.promote_types(projections.dtype, torch.float32)), dim=1)


def _source(head: str) -> str:
    return "maps" if head in _OF_MAPS else "features"


def _rename_old_keys(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in list(state):
        for old, new in _OLD_KEYS:
            if key.startswith(prefix + old):
                state[prefix + new + key.removeprefix(prefix + old)] = state.pop(key)
