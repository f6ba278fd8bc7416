from collections.abc import Sequence

import numpy as np
import pytest
import torch

from nldist.data.draws import DrawSource

MASK = (1 << 64) - 1


def uniform(key: Sequence[int], draws: torch.Tensor, position: int = 0, num: int = 1) -> np.ndarray:
    return DrawSource(key, draws).at(position).uniform(num).numpy()


def mix(z: int) -> int:
    """splitmix64's finaliser, in Python's own integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_tensor_arithmetic_is_splitmix64_in_exact_integers() -> None:
    golden, draw, position, k = 0x9E3779B97F4A7C15, 123_456_789, 3, 2
    state = 0
    for part in (7, -1, 1 << 40):
        state = mix((state + mix((part + golden) & MASK) + golden) & MASK)
    stream = mix((mix((draw + golden) & MASK) + state) & MASK)
    expected = (mix((stream + golden * (position * 65536 + 1 + k)) & MASK) >> 32) / 2**32
    assert uniform((7, -1, 1 << 40), torch.tensor([draw]), position, 3)[0, k] == expected


def test_numbers_never_change_between_releases() -> None:
    got = (uniform((1, 2, 3), torch.arange(3), position=1, num=2) * 2**32).astype(np.int64)
    assert got.tolist() == [[1459058877, 621722329], [2769557700, 325771862], [2927708108, 2576091785]]


def test_uniform_by_chi_square() -> None:
    values = uniform((0, 0), torch.arange(100_000), num=4)
    assert values.min() >= 0
    assert values.max() < 1
    for column in values.T:
        counts = np.histogram(column, bins=100, range=(0, 1))[0]
        chi2 = ((counts - 1000.0) ** 2 / 1000).sum()
        assert 50 < chi2 < 160  # 99 degrees of freedom: mean 99, deviation 14


@pytest.mark.parametrize("what", ["ids", "keys", "epochs", "positions", "numbers", "low bits of ids"])
def test_neighbouring_streams_are_independent(what: str) -> None:
    ids = torch.arange(40_000)
    first = uniform((5, 1), ids)[:, 0]
    second = {
        "ids": uniform((5, 1), ids + 1)[:, 0],
        "keys": uniform((6, 1), ids)[:, 0],
        "epochs": uniform((5, 2), ids)[:, 0],
        "positions": uniform((5, 1), ids, position=1)[:, 0],
        "numbers": uniform((5, 1), ids, num=2)[:, 1],
        "low bits of ids": uniform((5, 1), ids ^ 1)[:, 0],
    }[what]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.025  # five deviations
    joint = np.histogram2d(first, second, bins=8, range=[(0, 1), (0, 1)])[0]
    assert 20 < ((joint - 625) ** 2 / 625).sum() < 120  # 63 degrees of freedom


def test_the_order_of_a_key_counts() -> None:
    ids = torch.arange(1000)
    assert not np.array_equal(uniform((1, 2), ids), uniform((2, 1), ids))
    assert not np.array_equal(uniform((1,), ids), uniform((1, 0), ids))


def test_a_sample_keeps_its_numbers_in_any_batch() -> None:
    ids = torch.randperm(500)
    whole = uniform((3,), ids, num=5)
    assert np.array_equal(whole[100:150], uniform((3,), ids[100:150], num=5))


def test_integers_and_ranges_stay_inside() -> None:
    rng = DrawSource((9,), torch.arange(20_000)).at(0)
    integers = rng.below(7)
    assert set(integers.tolist()) == set(range(7))
    assert abs(integers.double().mean().item() - 3) < 0.08
    between = rng.between(-2.0, 5.0)
    assert between.min() >= -2
    assert between.max() < 5
    assert abs(rng.chance(0.3).double().mean().item() - 0.3) < 0.02


@pytest.mark.gpu
def test_same_numbers_on_a_gpu() -> None:
    ids = torch.arange(10_000)
    on_gpu = DrawSource((1, 2), ids.cuda()).at(4).uniform(3).cpu().numpy()
    assert np.array_equal(on_gpu, uniform((1, 2), ids, position=4, num=3))
