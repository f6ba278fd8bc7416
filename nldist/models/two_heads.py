"""Classifiers with further heads on the same backbone."""

from typing import Literal

import torch
from torch import nn

from nldist.models.classifier import Classifier


class TwoHeads(nn.Module):
    """ScanMix's network: one backbone, a classification and a clustering head (algorithms 3.a).

    `active` says which head's logits `forward` gives.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.cluster_head = nn.Linear(classifier.num_features, classifier.num_classes)
        self.active: Literal["classify", "cluster"] = "classify"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (b, num_classes) of normalised images (b, 3, h, w)."""
        head = self.classifier.head if self.active == "classify" else self.cluster_head
        logits: torch.Tensor = head(self.classifier.features(images))
        return logits


class ClusterHeads(nn.Module):
    """Several clusterings on one backbone, each with as many outputs as there are classes.

    With `heads_only` the backbone stays as it is, its batch-norm statistics included.
    """

    def __init__(self, classifier: Classifier, num_heads: int, *, heads_only: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        self.num_heads, self._heads_only = num_heads, heads_only
        classifier.backbone.requires_grad_(not heads_only)
        self.heads = nn.Linear(classifier.num_features, num_heads * classifier.num_classes)
        del classifier.head  # `take` puts one of ours there

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (b, num_heads * num_classes), head by head, of normalised images (b, 3, h, w)."""
        logits: torch.Tensor = self.heads(self.classifier.features(images))
        return logits

    def train(self, mode: bool = True) -> "ClusterHeads":
        """See Module."""
        super().train(mode)
        if self._heads_only:
            self.classifier.backbone.eval()
        return self

    def take(self, number: int) -> dict[str, torch.Tensor]:
        """The state of a Classifier with head `number`."""
        num_classes = self.classifier.num_classes
        rows = slice(number * num_classes, (number + 1) * num_classes)
        head = {"head.weight": self.heads.weight[rows], "head.bias": self.heads.bias[rows]}
        return self.classifier.state_dict() | {name: value.detach().clone() for name, value in head.items()}
