import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nldist.dist.world import World
from nldist.losses import (
    agreement,
    class_mean_squared_error,
    mean_negative_entropy,
    mix,
    negative_entropy,
    prior_penalty,
    sharpen,
    soft_cross_entropy,
)
from tests.ranks import run_ranks


def some_logits(rows: int = 12, classes: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def test_soft_cross_entropy_is_torch_s_with_soft_targets() -> None:
    logits, targets = some_logits(), some_logits(seed=1).softmax(1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), F.cross_entropy(logits, targets))


def test_negative_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [100.0, -100.0]], dtype=torch.float64)
    torch.testing.assert_close(negative_entropy(logits), torch.tensor(-np.log(2) / 2))


def test_class_mean_squared_error_averages_over_classes_too() -> None:
    p, t = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert class_mean_squared_error(p, t).item() == 0.5


def test_sharpen_by_hand_and_its_limits() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    torch.testing.assert_close(sharpen(p, 0.5), torch.tensor([[0.25, 0.09, 0.04]]) / 0.38)
    torch.testing.assert_close(sharpen(p, 1.0), p)


def test_mix_pairs_each_row_with_its_partner() -> None:
    values = torch.arange(4.0)[:, None]
    mixed = mix(values, torch.tensor([3, 0, 1, 2]), 0.75, 2)
    torch.testing.assert_close(mixed, torch.tensor([[0.75 * 0 + 0.25 * 3], [0.75 * 1 + 0.25 * 0]]))


def test_agreement_of_pairs_by_hand_and_its_floor() -> None:
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    n = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([np.log(0.5), np.log(0.5), -100.0])
    torch.testing.assert_close(agreement(p.log(), n.log()), expected.double())


def prior_of(probabilities: torch.Tensor) -> torch.Tensor:
    """The definition, on one process (our own reference)."""
    prior = 1 / probabilities.shape[1]
    return sum(prior * torch.log(prior / p) for p in probabilities.mean(0))  # type: ignore[return-value]


def negative_entropy_of_mean(probabilities: torch.Tensor) -> torch.Tensor:
    """The definition, on one process (our own reference)."""
    mean = probabilities.mean(0)
    return (mean * torch.log(mean)).sum()


TERMS = {"prior": (prior_penalty, prior_of), "entropy": (mean_negative_entropy, negative_entropy_of_mean)}


def term_gradient(world: World, name: str, logits: np.ndarray, cuts: list[int]) -> tuple[float, np.ndarray]:
    rows = np.split(logits, cuts)[world.rank]
    mine = torch.from_numpy(rows).requires_grad_()
    value = TERMS[name][0](mine.softmax(1), world)
    (value / world.size).backward()  # type: ignore[no-untyped-call] # DDP averages the ranks' gradients
    assert mine.grad is not None
    return value.item(), mine.grad.numpy()


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("cuts", [[], [6], [4, 8], [3, 6, 9], [7], [1, 10]], ids=str)
def test_terms_of_the_mean_prediction_have_the_gradient_of_the_concatenated_batch(name: str, cuts: list[int]) -> None:
    """Invariant 8; also where the ranks have different numbers of rows."""
    logits = some_logits()
    whole = logits.clone().requires_grad_()
    expected = TERMS[name][1](whole.softmax(1))
    expected.backward()  # type: ignore[no-untyped-call]
    assert whole.grad is not None
    results = run_ranks(term_gradient, len(cuts) + 1, name, logits.numpy(), cuts)
    for value, _ in results:
        assert abs(value - expected.item()) < 1e-12
    gradient = np.concatenate([gradient for _, gradient in results])
    assert np.abs(gradient - whole.grad.numpy()).max() < 1e-12


def test_shapes_in_signatures_are_checked() -> None:
    """Where the tests' conftest asks for it: a target with a class too few would be broadcast."""
    with pytest.raises(Exception, match="targets"):
        soft_cross_entropy(torch.zeros(4, 3), torch.zeros(4, 1))
