"""Which sample goes into which batch on which rank, in which role.

Pure functions of (seed, epoch, world, facts). A plan has no iterator state: resuming at step k is asking for
step k. It keeps at most its rank's ids in memory.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from nldist.data.index import owned
from nldist.data.order import Ids, Order, hash_ids

_SHUFFLED, _LABELLED, _UNLABELLED = 1, 2, 3


class Part(NamedTuple):
    """One role's samples in one step on one rank.

    Attributes:
        ids: int64 (b,), which samples.
        draws: int64 (b,), id + N * repeat: names this occurrence of the sample within the epoch.
    """

    ids: np.ndarray
    draws: np.ndarray


class Plan(Protocol):
    """The batches of one epoch on one rank. `num_steps` is the same on every rank."""

    @property
    def num_steps(self) -> int:
        """Number of steps, the same on every rank."""

    def step(self, k: int) -> dict[str, Part]:
        """Role -> this rank's part of step `k`, for k in 0..num_steps-1."""


def sweep(n: int, *, rank: int, size: int, batch_size: int, population: np.ndarray | None = None) -> Plan:
    """Every id once, by its owner, in ascending order; role "all".

    Args:
        n: number of samples N of the data set.
        rank: this rank.
        size: number of ranks.
        batch_size: samples per step and rank; the last parts may be short or empty.
        population: sorted ids to look at; all N by default.
    """
    if population is None:
        mine = Ids.of(n, None, owned(n, rank, size))
        most = max(len(owned(n, r, size)) for r in range(size))
    else:
        bounds = _bounds(_sorted(population), n, size)
        mine = Ids.of(n, population, range(bounds[rank], bounds[rank + 1]))
        most = int(np.diff(bounds).max())
    return _Sweep(-(-most // batch_size), batch_size, mine)


def shuffled(
    n: int,
    *,
    rank: int,
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    window: int | None,
    population: np.ndarray | None = None,
    aligned: bool = False,
) -> Plan:
    """Every id of the population P once, shuffled; role "all"; ceil(|P| / (batch_size * size)) steps.

    A rank's slice (by position in the population) is cut evenly into the steps: parts differ by at most one
    sample and none is larger than `batch_size`, so no step has a tiny batch. `aligned` gives each rank the ids that
    it owns instead, of which the ranks have different numbers: as many steps as the rank with the most of them needs.

    Args:
        n: number of samples N of the data set.
        rank: this rank.
        size: number of ranks.
        batch_size: most samples per step and rank.
        seed: the run's seed.
        epoch: the epoch's number; every epoch has another order.
        window: records are shuffled within windows of this many neighbouring records, and the windows among
            each other, so that reads stay local; None shuffles the rank's whole slice.
        population: sorted ids to train on; all N by default.
        aligned: see above.

    Raises:
        ValueError: aligned, and a rank owns none of P.
    """
    total = n if population is None else len(_sorted(population))
    if population is None or not aligned:
        ids, num_steps = Ids.of(n, population, owned(total, rank, size)), _ceil_div(total, batch_size * size)
    else:
        bounds = _bounds(population, n, size)
        if not np.diff(bounds).all():
            raise ValueError(f"{total} samples leave some of {size} ranks without any")
        ids = Ids.of(n, population, range(bounds[rank], bounds[rank + 1]))
        num_steps = _ceil_div(int(np.diff(bounds).max()), batch_size)
    order = Order(len(ids), window, (seed, epoch, _SHUFFLED, rank, 0))
    return _Shuffled({"all": _Even(num_steps, ids, order)})


def divided(
    n: int,
    labelled: np.ndarray,
    unlabelled: np.ndarray,
    *,
    rank: int,
    size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    window: int | None,
) -> Plan:
    """A labelled and an unlabelled part per step (roles "labelled" and "unlabelled").

    The labelled set X (sorted ids) is covered exactly once in ceil(|X| / (batch_size * size)) steps, as in
    `shuffled`. The unlabelled set U (sorted ids) gives `batch_size` samples per step and begins again with a
    new order when it is exhausted. A rank whose slice of U is empty uses all of U; an empty U gives empty
    parts. The other arguments are those of `shuffled`.

    Raises:
        ValueError: X has fewer samples than there are ranks.
    """
    num_labelled, num_unlabelled = len(_sorted(labelled)), len(_sorted(unlabelled))
    if num_labelled < size:
        raise ValueError(f"{num_labelled} labelled samples cannot be divided among {size} ranks")
    mine = Ids.of(n, labelled, owned(num_labelled, rank, size))
    order = Order(len(mine), window, (seed, epoch, _LABELLED, rank, 0))
    slice_ = owned(num_unlabelled, rank, size) or range(num_unlabelled)
    rest = Ids.of(n, unlabelled, slice_)
    return _Shuffled(
        {
            "labelled": _Even(_ceil_div(num_labelled, batch_size * size), mine, order),
            "unlabelled": _Cycled(n, batch_size, rest, window, (seed, epoch, _UNLABELLED, rank)),
        }
    )


def balanced(labels: np.ndarray, n: int, *, seed: int, epoch: int, num_classes: int) -> np.ndarray:
    """A class-balanced random subset of about `n` samples, the same for any world (docs/dividemix.md, "Two forms").

    Of each class the `n // num_classes` samples with the smallest hash(seed, epoch, id) are taken; a class
    with fewer gives all it has.

    Args:
        labels: int (N,), the label of every id.
        n: number of samples wanted in all.
        seed: the run's seed.
        epoch: the epoch's number.
        num_classes: number of classes C.

    Returns:
        Sorted ids, int64.
    """
    hashes, num_each = hash_ids(np.arange(len(labels)), (seed, epoch)), n // num_classes
    # Numbers of 16 bits are sorted in linear time.
    by_class = np.argsort(labels.astype(np.min_scalar_type(num_classes)), kind="stable")
    chosen = [
        members if len(members) <= num_each else members[np.argpartition(hashes[members], num_each)[:num_each]]
        for members in np.split(by_class, np.bincount(labels, minlength=num_classes).cumsum()[:-1])
    ]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class _Sweep:
    num_steps: int
    batch_size: int
    ids: Ids

    def step(self, k: int) -> dict[str, Part]:
        begin = min(k * self.batch_size, len(self.ids))
        ids = self.ids.take(np.arange(begin, min(begin + self.batch_size, len(self.ids))))
        return {"all": Part(ids, ids)}


@dataclass(frozen=True)
class _Even:
    """A slice in a shuffled order, cut evenly into the steps."""

    num_steps: int
    ids: Ids
    order: Order

    def part(self, k: int) -> Part:
        count = len(self.ids)
        begin, end = count * k // self.num_steps, count * (k + 1) // self.num_steps
        ids = self.ids.take(self.order.positions(begin, end))
        return Part(ids, ids)


@dataclass
class _Cycled:
    """A slice in shuffled order, again and again, `batch_size` samples at a time."""

    n: int
    batch_size: int
    ids: Ids
    window: int | None
    key: tuple[int, ...]
    _pass: tuple[int, Order] | None = field(default=None, repr=False)

    def part(self, k: int) -> Part:
        count = len(self.ids)
        begin, end = (k * self.batch_size, (k + 1) * self.batch_size) if count else (0, 0)
        ids, draws = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while begin < end:
            repeat, start = divmod(begin, count)
            stop = min(start + end - begin, count)
            ids.append(self.ids.take(self._order(repeat).positions(start, stop)))
            draws.append(ids[-1] + self.n * repeat)
            begin += stop - start
        return Part(np.concatenate(ids), np.concatenate(draws))

    def _order(self, repeat: int) -> Order:
        if self._pass is None or self._pass[0] != repeat:
            self._pass = repeat, Order(len(self.ids), self.window, (*self.key, repeat))
        return self._pass[1]


@dataclass(frozen=True)
class _Shuffled:
    """Roles side by side; the first one sets the number of steps."""

    roles: dict[str, Any]

    @property
    def num_steps(self) -> int:
        return int(next(iter(self.roles.values())).num_steps)

    def step(self, k: int) -> dict[str, Part]:
        return {role: parts.part(k) for role, parts in self.roles.items()}


def _sorted(ids: np.ndarray) -> np.ndarray:
    if len(ids) > 1 and not (np.diff(ids) > 0).all():
        raise ValueError("ids must be sorted and distinct")
    return ids


def _bounds(population: np.ndarray, n: int, size: int) -> list[int]:
    """Where each rank's owned ids begin in the population, and its end."""
    edges: list[int] = np.searchsorted(population, [rank * n // size for rank in range(size + 1)]).tolist()
    return edges


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
