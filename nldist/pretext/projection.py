"""The network of self-supervised training: a backbone and a projector."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PretextModel(nn.Module):
    """A backbone and a projector Linear-ReLU-Linear to the unit sphere (algorithms 3.b A1; MoCo-v2, section 3).

    Args:
        backbone: (b, 3, h, w) -> (b, num_features).
        num_features: its number F of features; the hidden layer of the projector has as many.
        dim: number of features of the projector.
    """

    def __init__(self, backbone: nn.Module, num_features: int, dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features, self.dim = num_features, dim
        self.projector = nn.Sequential(
            nn.Linear(num_features, num_features), nn.ReLU(inplace=True), nn.Linear(num_features, dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Projections (b, dim) of length 1, float32 also under autocast, of normalised images (b, 3, h, w)."""
        projections: Tensor = self.projector(self.backbone(images))
        return F.normalize(projections.to(torch.promote_types(projections.dtype, torch.float32)), dim=1)
