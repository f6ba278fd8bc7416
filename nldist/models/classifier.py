"""An image classifier: a backbone that gives pooled features, and a linear head."""

import torch
from torch import nn


class Classifier(nn.Module):
    """A backbone (b, 3, h, w) -> (b, num_features) and a linear head -> (b, num_classes)."""

    def __init__(self, backbone: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = num_features
        self.num_classes = num_classes
        self.head = nn.Linear(num_features, num_classes)
        self.frozen = False  # whether the backbone learns nothing (its batch-norm statistics still follow the mode)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (b, num_features) of normalised images (b, 3, h, w)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features: torch.Tensor = self.backbone(images)
        return features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (b, num_classes) of normalised images (b, 3, h, w)."""
        logits: torch.Tensor = self.head(self.features(images))
        return logits
