"""Classifiers by name: our own small networks, and everything that timm knows."""

import difflib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from nldist.errors import UserError
from nldist.models.classifier import Classifier
from nldist.models.pretrained import load_pretrained
from nldist.models.resnet_cifar import BasicBlock, PreActBlock, ResNetCIFAR
from nldist.models.small import SmallCNN

OWN_BACKBONES: dict[str, Callable[[], SmallCNN | ResNetCIFAR]] = {
    "small_cnn": SmallCNN,
    "preact_resnet18": partial(ResNetCIFAR, PreActBlock, (2, 2, 2, 2)),
    "resnet18_cifar": partial(ResNetCIFAR, BasicBlock, (2, 2, 2, 2)),
    "resnet34_cifar": partial(ResNetCIFAR, BasicBlock, (3, 4, 6, 3)),
}


def model_names() -> list[str]:
    """Every name that `build_model` takes: our own first, then timm's."""
    import timm

    return [*OWN_BACKBONES, *timm.list_models()]


def build_model(name: str, num_classes: int, *, pretrained: Path | None = None) -> Classifier:
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
    model = Classifier(backbone, num_features, num_classes)
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
