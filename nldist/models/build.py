"""Classifiers by name: our own small networks, and everything that timm knows."""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nldist.errors import UserError
from nldist.models.network import Network
from nldist.models.pretrained import load_pretrained
from nldist.models.resnet_cifar import BasicBlock, PreActBlock, ResNetCIFAR
from nldist.models.small import SmallCNN

OWN_BACKBONES: dict[str, Callable[[], SmallCNN | ResNetCIFAR]] = {
    "small_cnn": SmallCNN,
    "preact_resnet18": partial(ResNetCIFAR, PreActBlock, (2, 2, 2, 2)),
    "resnet18_cifar": partial(ResNetCIFAR, BasicBlock, (2, 2, 2, 2), kaiming=True),
    "resnet34_cifar": partial(ResNetCIFAR, BasicBlock, (3, 4, 6, 3)),
}

# Where weights of one name came to mean another network: how often, and how the present one differs from the last.
_CHANGED = {
    "preact_resnet18": (1, "since nldist 0.2 its identity shortcuts carry relu(bn1(x)), as DivideMix's do, and not x"),
}


def model_revision(name: str) -> int:
    """Which network the name stands for: 1, or more where weights that an earlier nldist saved mean another one."""
    return 1 + _CHANGED.get(name, (0, ""))[0]


def check_revision(saved: Mapping[str, Any], name: str, path: Path) -> None:
    """Refuse (UserError) what was saved of a network that the name no longer stands for.

    Args:
        saved: what `path` holds; "model_revision" in it, 1 where it is missing.
        name: of the model.
        path: to name in the error.
    """
    revision = saved.get("model_revision", 1)
    if revision > model_revision(name):
        raise UserError(f"{path} is of a {name} that this nldist does not know yet: update nldist")
    if revision < model_revision(name):
        raise UserError(
            f"{path} is of another {name}: {_CHANGED[name][1]}; train anew in another run.dir, or use nldist 0.1 for it"
        )


def model_names() -> list[str]:
    """Every name that `build_model` takes: our own first, then timm's."""
    import timm

    return [*OWN_BACKBONES, *timm.list_models()]


def build_model(name: str, num_classes: int, *, pretrained: Path | None = None) -> Network:
    """Build the classifier `name` with `num_classes` outputs, with random weights or those of a local file.

    Args:
        name: small_cnn, preact_resnet18, resnet18_cifar, resnet34_cifar, or any timm model.
        num_classes: the size of the linear head.
        pretrained: a checkpoint (.safetensors, or a torch file of tensors) whose backbone weights are taken,
            and its head too when it has the same shape. Nothing is ever downloaded.

    Raises:
        UserError: the name is unknown, or the checkpoint is missing, unreadable or of another backbone.
    """
    backbone, num_features, head_name = _backbone(name)
    model = Network(backbone, num_features, classify=nn.Linear(num_features, num_classes))
    if pretrained is not None:
        load_pretrained(model, pretrained, head_name=head_name)
    return model


def _backbone(name: str) -> tuple[nn.Module, int, str]:
    """The backbone, its number of features, and what a plain checkpoint of it calls its linear head."""
    if name in OWN_BACKBONES:
        own = OWN_BACKBONES[name]()
        return own, own.num_features, "head"
    import timm  # takes seconds, which own backbones do not need

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, model_names(), n=4, cutoff=0.5) or list(OWN_BACKBONES)
        raise UserError(f"unknown model {name!r}: did you mean {', '.join(close)}?")
    backbone = timm.create_model(name, num_classes=0, pretrained=False)
    # What the pooled output holds: some backbones widen it behind the last map (MobileNet, VGG).
    num_features = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return backbone, int(num_features), str(backbone.default_cfg.get("classifier", "head"))
