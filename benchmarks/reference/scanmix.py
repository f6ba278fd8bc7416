"""ScanMix's epoch (Sachdeva et al., arXiv 2103.11395): docs/scanmix.md has the equations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import dividemix
from .dividemix import RANDOM, Settings
from .network import TwoHeads


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """An image and one neighbour that is predicted to be of its class, drawn anew each time; a view of each.

    Args:
        images: uint8 (N, h, w, 3).
        neighbours: int (N, K + 1), the image itself first.
        predicted: int (N,), by the other network.
        transform: makes a view of a PIL image.
    """

    def __init__(self, images: np.ndarray, neighbours: np.ndarray, predicted: np.ndarray, transform: Any) -> None:
        self.images, self.neighbours, self.predicted, self.transform = images, neighbours, predicted, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        near = self.neighbours[number]
        chosen = int(np.random.choice(near[self.predicted[near] == self.predicted[number]]))
        anchor, neighbour = (self.transform(Image.fromarray(self.images[place])) for place in (number, chosen))
        return anchor, neighbour


def losses(net: TwoHeads, anchors: Tensor, neighbours: Tensor) -> dict[str, Tensor]:
    """The disagreement of the pairs and the negative entropy of the anchors' mean prediction, with a gradient.

    Args:
        net: in train mode; called once for the anchors and once for the neighbours.
        anchors: (b, 3, h, w).
        neighbours: (b, 3, h, w), of each anchor one.
    """
    p, q = net.clusters(anchors).softmax(1), net.clusters(neighbours).softmax(1)
    agree = (p * q).sum(1).log().clamp_min(-100)
    mean = p.mean(0).clamp_min(1e-8)
    return {"loss_agree": -agree.mean(), "loss_entropy": (mean * mean.log()).sum()}


def cluster(
    net: TwoHeads, optimizer: torch.optim.Optimizer, pairs: Pairs, batch_size: int, lambda_e: float, rate: float
) -> None:
    """One network's clustering pass over all images."""
    net.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    for anchors, neighbours in DataLoader(pairs, batch_size, shuffle=True, drop_last=True):
        terms = losses(net, anchors, neighbours)
        optimizer.zero_grad()
        (terms["loss_agree"] + lambda_e * terms["loss_entropy"]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def epoch(
    nets: Sequence[TwoHeads],
    optimizers: Sequence[torch.optim.Optimizer],
    images: np.ndarray,
    labels: np.ndarray,
    neighbours: np.ndarray,
    number: int,
    settings: Settings,
    *,
    batch_size: int = 128,
    lambda_e: float = 5.0,
    rates: tuple[float, float] = (0.02, 1e-5),
) -> None:
    """DivideMix's epoch, then a clustering pass of each network with the classes that the other one predicted.

    `rates` are those of the semi-supervised and of the clustering part.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rates[0]
    predicted = dividemix.epoch(nets, optimizers, images, labels, number, settings)
    for own in (0, 1):
        pairs = Pairs(images, neighbours, predicted[1 - own], RANDOM)
        cluster(nets[own], optimizers[own], pairs, batch_size, lambda_e, rates[1])
