"""DivideMix's epoch (Li, Socher, Hoi; ICLR 2020), in its CIFAR form: docs/dividemix.md has the equations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
TO_TENSOR = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
RANDOM = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), TO_TENSOR])


@dataclass(frozen=True)
class Settings:
    """The paper's, for CIFAR-10."""

    batch_size: int = 64
    tau: float = 0.5
    temperature: float = 0.5
    alpha: float = 4.0
    lambda_u: float = 25.0
    warmup_epochs: int = 10
    rampup_epochs: int = 16


class Views(Dataset[tuple[Any, ...]]):
    """Some of the images, each in several views, with label, clean probability and place in the data set.

    Args:
        images: uint8 (N, h, w, 3).
        labels: int (N,).
        ids: of the images.
        transform: makes a view of a PIL image.
        num_views: of each image.
        clean: (N,), of the labels; None: all ones.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        ids: np.ndarray,
        transform: Any,
        num_views: int,
        clean: np.ndarray | None = None,
    ) -> None:
        self.images, self.labels, self.ids, self.transform, self.num_views = images, labels, ids, transform, num_views
        self.clean = np.ones(len(labels), np.float32) if clean is None else clean.astype(np.float32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        number = self.ids[place]
        image = Image.fromarray(self.images[number])
        views = [self.transform(image) for _ in range(self.num_views)]
        return *views, int(self.labels[number]), self.clean[number], int(number)


def losses(
    net: nn.Module,
    peer: nn.Module,
    x: Sequence[Tensor],
    u: Sequence[Tensor],
    labels: Tensor,
    clean: Tensor,
    weight: float,
    permutation: Tensor,
    temperature: float,
) -> dict[str, Tensor]:
    """A step's three terms (equations 3 to 11), with a gradient for `net`.

    Args:
        net: in train mode.
        peer: in eval mode.
        x: two views of the labelled, (b, 3, h, w) each.
        u: two views of the unlabelled.
        labels: of the labelled, int64 (b,).
        clean: probability of each label, (b,).
        weight: of an image against the one that is mixed in.
        permutation: of all the rows of x and u: which is mixed in.
        temperature: of the sharpening.
    """
    with torch.no_grad():
        guess = sum(model(view).softmax(1) for model in (net, peer) for view in u) / 4
        own = sum(net(view).softmax(1) for view in x) / 2
        y = F.one_hot(labels, own.shape[1]).to(own)
        refined = clean[:, None] * y + (1 - clean[:, None]) * own
        t_x, t_u = (q ** (1 / temperature) for q in (refined, guess))
        t_x, t_u = (q / q.sum(1, keepdim=True) for q in (t_x, t_u))
    images, targets = torch.cat([*x, *u]), torch.cat([t_x, t_x, t_u, t_u])
    images = weight * images + (1 - weight) * images[permutation]
    targets = weight * targets + (1 - weight) * targets[permutation]
    logits, num_labelled = net(images), 2 * len(labels)
    probabilities = logits.softmax(1)
    loss_x = -(targets[:num_labelled] * F.log_softmax(logits[:num_labelled], 1)).sum(1).mean()
    loss_u = ((probabilities[num_labelled:] - targets[num_labelled:]) ** 2).mean()
    prior = 1 / logits.shape[1]
    return {"loss_x": loss_x, "loss_u": loss_u, "prior": (prior * (prior / probabilities.mean(0)).log()).sum()}


def train(
    net: nn.Module,
    peer: nn.Module,
    optimizer: torch.optim.Optimizer,
    labelled: Views,
    unlabelled: Views,
    epoch: int,
    settings: Settings,
) -> None:
    """One network's epoch on its peer's division."""
    net.train()
    peer.eval()
    loaders = [DataLoader(part, settings.batch_size, shuffle=True) for part in (labelled, unlabelled)]
    others = iter(loaders[1])
    for step, (*x, labels, clean, _) in enumerate(loaders[0]):
        try:
            *u, _, _, _ = next(others)
        except StopIteration:
            others = iter(loaders[1])
            *u, _, _, _ = next(others)
        weight = float(np.random.beta(settings.alpha, settings.alpha))
        permutation = torch.randperm(2 * (len(x[0]) + len(u[0])))
        terms = losses(net, peer, x, u, labels, clean, max(weight, 1 - weight), permutation, settings.temperature)
        progress = (epoch + step / len(loaders[0]) - settings.warmup_epochs) / settings.rampup_epochs
        lambda_u = settings.lambda_u * min(max(progress, 0.0), 1.0)
        optimizer.zero_grad()
        (terms["loss_x"] + lambda_u * terms["loss_u"] + terms["prior"]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def sweep(net: nn.Module, images: np.ndarray, labels: np.ndarray, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Every image's loss by its given label and predicted class, both (N,)."""
    net.eval()
    data = Views(images, labels, np.arange(len(labels)), TO_TENSOR, 1)
    found: list[Tensor] = []
    predicted: list[Tensor] = []
    for view, given, _, _ in DataLoader(data, settings.batch_size):
        logits = net(view)
        found.append(F.cross_entropy(logits, given, reduction="none"))
        predicted.append(logits.argmax(1))
    return torch.cat(found).numpy(), torch.cat(predicted).numpy()


def clean_probability(found: np.ndarray) -> np.ndarray:
    """The posterior of the component with the smaller mean, float64 (N,) (section 3.1)."""
    values = ((found - found.min()) / (found.max() - found.min())).reshape(-1, 1)
    mixture = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4).fit(values)
    posterior: np.ndarray = mixture.predict_proba(values)[:, mixture.means_.argmin()]
    return posterior


def epoch(
    nets: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    images: np.ndarray,
    labels: np.ndarray,
    number: int,
    settings: Settings,
) -> list[np.ndarray]:
    """Sweep, mixture, both networks one after the other; returns the classes that each predicted in the sweep."""
    swept = [sweep(net, images, labels, settings) for net in nets]
    clean = [clean_probability(found) for found, _ in swept]
    for own in (0, 1):
        by_peer = clean[1 - own]
        parts = [
            Views(images, labels, np.flatnonzero(chosen), RANDOM, 2, by_peer)
            for chosen in (by_peer > settings.tau, by_peer <= settings.tau)
        ]
        train(nets[own], nets[1 - own], optimizers[own], parts[0], parts[1], number, settings)
    return [predicted for _, predicted in swept]
