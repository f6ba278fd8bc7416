import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.dist.world import World
from nldist.pretext.simclr import simclr_loss
from tests.pretext.test_gather import all_rows, part
from tests.ranks import run_ranks

COUNTS = [(6,), (4, 4), (2, 5), (3, 3, 3), (4, 1, 3)]


def reference_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Algorithms 3.b A1 term by term (our own reference)."""
    views = [*first, *second]
    losses = []
    for i, anchor in enumerate(first):
        denominator = sum(torch.exp(anchor @ view / temperature) for k, view in enumerate(views) if k != i)
        losses.append(-torch.log(torch.exp(anchor @ second[i] / temperature) / denominator))
    return torch.stack(losses).mean()


def inputs(num_images: int) -> tuple[Tensor, Tensor]:
    """Two views (n, 5) and the weight (5, 4) of a network z = normalise(x W)."""
    rows = all_rows(2 * num_images + 4, 5)
    return rows[:-4].reshape(num_images, 2, 5), rows[-4:].T.clone()


def project(views: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(views[:, 0] @ weight, dim=1), F.normalize(views[:, 1] @ weight, dim=1)


def loss_and_gradient(world: World, counts: tuple[int, ...]) -> tuple[float, np.ndarray]:
    views, weight = inputs(sum(counts))
    weight.requires_grad_()
    loss = simclr_loss(*project(part(views, counts, world), weight), 0.5, world)
    (gradient,) = torch.autograd.grad(loss, weight)
    return loss.item(), gradient.numpy()


@pytest.mark.parametrize("counts", COUNTS)
def test_loss_and_gradient_are_those_of_the_concatenated_batch(counts: tuple[int, ...]) -> None:
    views, weight = inputs(sum(counts))
    weight.requires_grad_()
    expected = reference_loss(*project(views, weight), 0.5)
    (gradient,) = torch.autograd.grad(expected, weight)
    results = run_ranks(loss_and_gradient, len(counts), counts)
    # DDP averages the ranks' gradients
    assert np.mean([loss for loss, _ in results]) == pytest.approx(expected.item(), abs=1e-9)
    np.testing.assert_allclose(np.mean([g for _, g in results], axis=0), gradient, atol=1e-9)


def test_the_loss_is_finite_where_the_exponentials_are_not() -> None:
    first = F.normalize(torch.randn(8, 16), dim=1)
    loss = simclr_loss(first, first, 1e-3, World.single())
    assert torch.isfinite(loss)
    assert float(loss) == pytest.approx(0, abs=1e-3), "each view is nearest to itself"
