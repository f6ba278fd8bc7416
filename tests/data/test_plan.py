import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from nldist.data.index import owned
from nldist.data.plan import Part, Plan, balanced, divided, shuffled, sweep

WORLDS = [1, 2, 3, 4, 7]
N = 1_000


def _all(make: Callable[..., Plan], size: int, role: str = "all") -> list[list[Part]]:
    """The parts of `role` by rank and step, after checking that all ranks make the same number of steps."""
    plans = [make(rank=rank, size=size) for rank in range(size)]
    assert len({plan.num_steps for plan in plans}) == 1
    return [[plan.step(k)[role] for k in range(plan.num_steps)] for plan in plans]


def _ids(parts: list[Part]) -> np.ndarray:
    return np.concatenate([part.ids for part in parts]) if parts else np.empty(0, np.int64)


def _draws(parts: list[Part]) -> np.ndarray:
    return np.concatenate([part.draws for part in parts])


def _some(n: int, count: int, seed: int = 0) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(n)[:count])


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("n", [0, 1, 3, 64, 65, 1000])
def test_sweep_sees_every_owned_id_once_in_order(size: int, n: int) -> None:
    ranks = _all(partial(sweep, n, batch_size=8), size)
    for rank, parts in enumerate(ranks):
        assert _ids(parts).tolist() == list(owned(n, rank, size))
        assert all(len(part.ids) <= 8 for part in parts)
    assert len(ranks[0]) == -(-max(len(owned(n, r, size)) for r in range(size)) // 8)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("population", [_some(N, 100), np.arange(700, 900), np.array([3]), np.empty(0, np.int64)])
def test_sweep_of_a_population_stays_with_the_owners(size: int, population: np.ndarray) -> None:
    ranks = _all(partial(sweep, N, batch_size=8, population=population), size)
    for rank, parts in enumerate(ranks):
        mine = owned(N, rank, size)
        assert _ids(parts).tolist() == [i for i in population if i in mine]


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("window", [None, 1, 7, 100, 5000])
@pytest.mark.parametrize("population", [None, _some(N, 333), np.array([5, 998])])
def test_shuffled_covers_the_population_once_in_even_parts(
    size: int, window: int | None, population: np.ndarray | None
) -> None:
    make = partial(shuffled, N, batch_size=16, seed=1, epoch=2, window=window, population=population)
    ranks = _all(make, size)
    wanted = np.arange(N) if population is None else population
    assert np.array_equal(np.sort(np.concatenate([_ids(parts) for parts in ranks])), wanted)
    for parts in ranks:
        sizes = [len(part.ids) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= 16
        assert np.array_equal(_ids(parts), _draws(parts))
    assert len(ranks[0]) == -(-len(wanted) // (16 * size))


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("population", [None, _some(N, 333), np.arange(0, N, 3)[:300]])
def test_shuffled_can_stay_with_the_owners(size: int, population: np.ndarray | None) -> None:
    make = partial(shuffled, N, batch_size=16, seed=1, epoch=2, window=50, population=population, aligned=True)
    if population is not None and population.max() < (size - 1) * N // size:
        with pytest.raises(ValueError, match=rf"300 samples leave some of {size} ranks without any"):
            make(rank=0, size=size)
        return
    ranks, wanted = _all(make, size), np.arange(N) if population is None else population
    most = 0
    for rank, parts in enumerate(ranks):
        mine = owned(N, rank, size)
        assert sorted(_ids(parts)) == [i for i in wanted if i in mine]
        sizes = [len(part.ids) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        most = max(most, sum(sizes))
    assert len(ranks[0]) == -(-most // 16)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_shuffled_never_exceeds_the_batch_size(batch_size: int) -> None:
    for n in range(1, 200, 7):
        for size in WORLDS:
            ranks = _all(partial(shuffled, n, batch_size=batch_size, seed=0, epoch=0, window=None), size)
            assert max(len(part.ids) for parts in ranks for part in parts) <= batch_size
            assert sum(len(part.ids) for parts in ranks for part in parts) == n


def _order(epoch: int, seed: int = 0, window: int | None = None) -> np.ndarray:
    plan = shuffled(N, rank=0, size=1, batch_size=32, seed=seed, epoch=epoch, window=window)
    return _ids([plan.step(k)["all"] for k in range(plan.num_steps)])


@pytest.mark.parametrize("window", [None, 50])
def test_order_depends_on_seed_and_epoch_only(window: int | None) -> None:
    np.random.seed(0)
    first = _order(3, window=window)
    np.random.seed(1)
    assert np.array_equal(first, _order(3, window=window))
    assert not np.array_equal(first, _order(4, window=window))
    assert not np.array_equal(first, _order(3, seed=1, window=window))


def test_whole_shuffle_is_uniform() -> None:
    """Every id is equally likely in every tenth of the epoch (chi-squared, 81 degrees of freedom)."""
    counts = np.zeros((10, 10))
    for epoch in range(100):
        np.add.at(counts, (np.arange(N) // 100, _order(epoch) // 100), 1)
    expected = counts.sum() / 100
    assert ((counts - expected) ** 2 / expected).sum() < 130


@pytest.mark.parametrize("window", [20, 64])
def test_windows_keep_reads_local_and_mix_differently_each_epoch(window: int) -> None:
    partners: set[int] = set()
    for epoch in range(20):
        order = _order(epoch, window=window)
        jumps = np.flatnonzero(np.abs(np.diff(order)) >= window)
        # A window's records lie within `window` of each other, so larger jumps occur only between windows.
        assert len(jumps) <= -(-N // window) + 1
        place = np.empty(N, int)
        place[order] = np.arange(N)
        near = np.flatnonzero(np.abs(place - place[500]) < window)
        partners.update(i for i in near.tolist() if abs(i - 500) < window)
        assert not np.array_equal(order, np.sort(order))
    assert len(partners) > window  # one fixed window would give at most `window` neighbours
    assert min(partners) < 500 < max(partners)


def test_a_step_can_be_asked_for_alone() -> None:
    make = partial(shuffled, N, rank=1, size=2, batch_size=16, seed=1, epoch=2, window=30)
    plan = make()
    forward = [plan.step(k)["all"].ids for k in range(plan.num_steps)]
    for k in reversed(range(plan.num_steps)):
        assert np.array_equal(make().step(k)["all"].ids, forward[k])
        assert np.array_equal(plan.step(k)["all"].ids, forward[k])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 25])
@pytest.mark.parametrize(("num_labelled", "num_unlabelled"), [(200, 800), (600, 40), (500, 500), (10, 2), (64, 0)])
def test_divided(size: int, window: int | None, num_labelled: int, num_unlabelled: int) -> None:
    labelled = _some(N, num_labelled)
    unlabelled = np.setdiff1d(_some(N, num_labelled + num_unlabelled), labelled)
    make = partial(divided, N, labelled, unlabelled, batch_size=16, seed=0, epoch=0, window=window)
    ranks = _all(make, size, "labelled")
    assert len(ranks[0]) == -(-num_labelled // (16 * size))
    assert np.array_equal(np.sort(np.concatenate([_ids(parts) for parts in ranks])), labelled)
    rest = _all(make, size, "unlabelled")
    for rank, parts in enumerate(rest):
        assert {len(part.ids) for part in parts} == {16 if len(unlabelled) else 0}
        ids, draws = _ids(parts), _draws(parts)
        assert np.array_equal(draws % N, ids)
        assert len(set(draws.tolist())) == len(draws)
        slice_ = owned(len(unlabelled), rank, size) or range(len(unlabelled))
        mine = unlabelled[slice_.start : slice_.stop]
        times = Counter(ids.tolist())
        assert set(times) <= set(mine.tolist())
        used = [times[i] for i in mine.tolist()]
        assert max(used, default=0) - min(used, default=0) <= 1  # no id comes again before all have come
        assert all(sorted(draws[ids == i] // N) == list(range(times[i])) for i in times)


def test_unlabelled_passes_have_different_orders() -> None:
    plan = divided(N, np.arange(500), np.arange(500, 532), rank=0, size=1, batch_size=32, seed=0, epoch=0, window=None)
    first, second = plan.step(0)["unlabelled"].ids, plan.step(1)["unlabelled"].ids
    assert np.array_equal(np.sort(first), np.sort(second))
    assert not np.array_equal(first, second)


def test_divided_refuses_fewer_labelled_samples_than_ranks() -> None:
    with pytest.raises(ValueError, match="2 labelled samples cannot be divided among 3 ranks"):
        divided(N, np.array([1, 2]), np.arange(3, N), rank=0, size=3, batch_size=4, seed=0, epoch=0, window=None)


def test_unsorted_ids_are_refused() -> None:
    for ids in (np.array([2, 1]), np.array([1, 1])):
        with pytest.raises(ValueError, match="sorted and distinct"):
            sweep(N, rank=0, size=1, batch_size=4, population=ids)


def test_balanced_takes_the_smallest_keys_of_each_class() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(5, size=4_000, p=[0.5, 0.3, 0.15, 0.04, 0.01])
    ids = balanced(labels, 1_000, seed=1, epoch=2, num_classes=5)
    per_class = np.bincount(labels, minlength=5)
    assert np.bincount(labels[ids], minlength=5).tolist() == np.minimum(per_class, 200).tolist()
    assert (np.diff(ids) > 0).all()
    keys = [_splitmix(1, 2, i) for i in range(len(labels))]
    assert len(set(keys)) == len(keys)
    brute: list[int] = []
    for c in range(5):
        members = [i for i in range(len(labels)) if labels[i] == c]
        brute += sorted(members, key=keys.__getitem__)[:200]
    assert ids.tolist() == sorted(brute)


def test_balanced_changes_with_epoch_and_is_uniform_within_a_class() -> None:
    labels = np.arange(N) % 2
    taken = np.zeros(N, int)
    for epoch in range(200):
        taken[balanced(labels, 200, seed=0, epoch=epoch, num_classes=2)] += 1
    assert taken.sum() == 200 * 200
    assert 15 < taken.min() < taken.max() < 70  # 200 draws with probability 0.2: 40 +- 5.7


@pytest.mark.parametrize("n", [50_000, 2_400_000])
def test_a_pickled_plan_holds_only_its_ranks_ids(n: int) -> None:
    half = np.arange(0, n, 2)
    args = {"rank": 3, "size": 8, "batch_size": 64, "window": 4096, "seed": 0, "epoch": 0}
    plans = [shuffled(n, **args), sweep(n, rank=3, size=8, batch_size=64)]  # type: ignore[arg-type]
    for plan in plans:
        plan.step(5)
        assert len(pickle.dumps(plan)) < 2_000
    plan = divided(n, half, half + 1, **args)  # type: ignore[arg-type]
    before = plan.step(7)
    sent = pickle.dumps(plan)
    assert len(sent) < 2 * 4 * len(half) // 8 + 4_000
    after = pickle.loads(sent).step(7)
    assert all(np.array_equal(before[role].draws, after[role].draws) for role in before)


def _splitmix(seed: int, epoch: int, i: int) -> int:
    """The i-th output of Vigna's SplitMix64, from the state that the seed and epoch give."""
    mask = 2**64 - 1
    z = int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0])
    z = (z + (i + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
