"""Nearest neighbours among vectors that are spread over the ranks, exactly and the same for any number of ranks.

Each rank searches its own vectors for the queries of all; the query's owner merges the lists by (descending
score, ascending id). Ids count the vectors in rank order (docs/scanmix.md, "At full scale").
"""

from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import torch

from nldist.dist.memory import return_freed_memory
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.estimate.shard import MAX_K, Shard, lengths, settle_faiss

# Queries of all ranks that are searched at a time: what bounds the memory of a search.
_BLOCK = 8_192
# A product of two such lengths, and so every partial sum of an inner product, fits float32.
_MAX_LENGTH = 1e18
_ENTRY = np.dtype([("score", np.float64), ("id", np.int64)])
# Training vectors at most, and for each inverted list where that is more. Twice as many, as FAISS wants them, find
# few more neighbours (0.92 for 0.90 of those of 2.4 M synthetic vectors), and need twice the memory.
_TRAINING_SIZE, _PER_LIST = 65_536, 20
# Of more lists than this FAISS's k-means, whose time grows with their square, would take longer than the search.
_ONE_LEVEL = 1024


class ShardedIndex:
    """Inner-product search over the vectors of all ranks, each of which keeps its own.

    "Flat" is exact: scores are float64 functions of the two vectors alone, so that lists are bit for bit the same
    for any number of ranks. Any other FAISS factory string is approximate: candidates come from an index that is
    trained once, on rank 0, and shared by all; they are scored exactly. Such lists can differ between numbers of
    ranks, since each rank proposes candidates.

    Attributes:
        owned: the ids of this rank's vectors.
        owned_by: those of every rank's, in rank order.
        num_vectors: vectors of all ranks.
        world: the ranks.
        for_pairs: whether nldist.estimate.pairs can search it.
    """

    def __init__(self, vectors: np.ndarray, world: World, factory: str, trained: np.ndarray | None) -> None:
        counts = world.all_gather(np.array([len(vectors)], np.int64))
        bounds = [0, *np.cumsum(counts).tolist()]
        self.owned_by = [range(*ends) for ends in pairwise(bounds)]
        self.owned, self.num_vectors, self.world = self.owned_by[world.rank], bounds[-1], world
        self._device, self.for_pairs = _device(world), searches_pairs(factory, world)
        settle_faiss()
        try:
            index = None if trained is None else faiss.deserialize_index(trained)
            self._shard = Shard(_tensor(vectors).to(self._device), index)
        except RuntimeError as error:
            raise UserError(f"FAISS cannot use the index {factory!r} here: {_reason(error)}") from error

    @classmethod
    def build(
        cls, vectors: np.ndarray, world: World, *, factory: str = "Flat", num_probe: int | None = None, seed: int = 0
    ) -> "ShardedIndex":
        """Index the vectors of all ranks. A collective.

        Args:
            vectors: (owned, d) float32, used in place on a CPU. A rank may own none.
            world: the ranks.
            factory: "Flat" for exact search, or any FAISS factory string.
            num_probe: inverted lists that an IVF index searches; None: FAISS's default, one.
            seed: of the choice of training vectors, which is the same for any number of ranks.

        Raises:
            UserError: a vector is not finite; FAISS doesn't know the factory string or cannot train it on so few
                vectors; `num_probe` is set for an index without inverted lists.
        """
        _refuse(vectors, world, "vectors")
        settle_faiss()
        index = _empty_index(vectors.shape[1], factory, num_probe)
        trained = None if factory == "Flat" else _train(index, vectors, world, factory, seed)
        return_freed_memory()  # the training's, and that of the pass that made the vectors
        return cls(vectors, world, factory, trained)

    def vectors(self, ids: range) -> np.ndarray:
        """The vectors (b, d) float32 of `ids`, all of which this rank owns."""
        start = ids.start - self.owned.start
        assert not ids or 0 <= start <= start + len(ids) <= len(self.owned), "ids of another rank"
        return np.asarray(self._shard.vectors[start : start + len(ids)].cpu().numpy())

    def fetch(self, ids: np.ndarray) -> np.ndarray:
        """The vectors (b, d) float32 of ids (b,) of any rank, ascending; b may differ between ranks. A collective."""
        edges = np.searchsorted(ids, [owned.start for owned in self.owned_by] + [self.num_vectors])
        asked = self.world.all_gather(np.diff(edges)[None])  # row: who asks; column: whom
        mine, of_me = asked[self.world.rank], asked[:, self.world.rank]
        wanted = _exchange(ids, mine, of_me, self.world)
        return _exchange(self.vectors(self.owned)[wanted - self.owned.start], of_me, mine, self.world)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k vectors, of any rank, of largest inner product with each query of this rank. A collective.

        Args:
            queries: (b, d) float32; b may differ between ranks, and be 0.
            k: at most 512.

        Returns:
            Scores (b, k) float64, descending, and ids (b, k) int64, ascending where scores are equal; -inf and -1
            where there are fewer than k vectors (or an approximate index finds fewer).

        Raises:
            UserError: a query of any rank is not finite.
        """
        if not 1 <= k <= MAX_K:
            raise ValueError(f"k must be in 1..{MAX_K}, not {k}")
        counts = _refuse(queries, self.world, "queries")
        size = max(1, _BLOCK // self.world.size)
        blocks = [
            self._search_block(queries[start : start + size], np.clip(counts - start, 0, size), k)
            for start in range(0, max(int(counts.max()), 1), size)
        ]
        scores, ids = (np.concatenate(column) for column in zip(*blocks, strict=True))
        return scores, ids

    def _search_block(self, queries: np.ndarray, counts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search` for the next `counts` (ranks,) queries of each rank, which all ranks can hold at once."""
        everyone = _tensor(self.world.all_gather(queries)).to(self._device)
        scores, rows = (part.cpu().numpy() for part in self._shard.search(everyone, k))
        lists = np.empty((len(everyone), k), _ENTRY)
        lists["score"], lists["id"] = -np.inf, -1
        lists["score"][:, : scores.shape[1]] = scores
        lists["id"][:, : rows.shape[1]] = np.where(rows < 0, -1, rows + self.owned.start)
        mine = _exchange(lists.view(np.int64), counts, np.full_like(counts, len(queries)), self.world)
        merged = mine.view(_ENTRY).reshape(self.world.size, len(queries), k).swapaxes(0, 1)
        merged = merged.reshape(len(queries), self.world.size * k)
        # Ids ascend with the rank and each list is in order: a stable sort by score leaves ties in ascending order.
        best = np.argsort(-merged["score"], axis=1, kind="stable")[:, :k]
        merged = np.take_along_axis(merged, best, axis=1)
        return merged["score"], merged["id"]


def searches_pairs(factory: str, world: World) -> bool:
    """Whether such an index is one for nldist.estimate.pairs: exact, and on the CPU."""
    return factory == "Flat" and _device(world).type == "cpu"


def refuse_few(index: ShardedIndex, k: int) -> None:
    """Fail (UserError) if the vectors don't have k others each."""
    if index.num_vectors <= k:
        most = index.num_vectors - 1
        raise UserError(f"{index.num_vectors} samples do not have {k} neighbours each; lower k to {most} at most")


def others(found: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """The k nearest others (b, k) of `ids` (b,), from the k + 1 nearest that were found, as a rule with themselves."""
    other = found != ids[:, None]
    other[other.all(axis=1), -1] = False
    return np.asarray(found[other].reshape(len(ids), found.shape[1] - 1))


def _device(world: World) -> torch.device:
    return world.device if faiss.get_num_gpus() else torch.device("cpu")


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def _refuse(vectors: np.ndarray, world: World, what: str) -> np.ndarray:
    """Fail on every rank if a vector of any is unusable; else how many each rank has, (ranks,). A collective."""
    bad = ~(lengths(_tensor(vectors)).numpy() < _MAX_LENGTH)
    facts = world.all_gather(np.array([[len(vectors), bad.sum()]], np.int64))
    if facts[:, 1].any():
        ranks = ", ".join(str(rank) for rank in np.flatnonzero(facts[:, 1]))
        raise UserError(
            f"{facts[:, 1].sum()} of {facts[:, 0].sum()} {what} have no neighbours: NaN, infinite or longer than "
            f"{_MAX_LENGTH:g} (on rank {ranks}); check the network that made them"
        )
    return facts[:, 0]


def _empty_index(dim: int, factory: str, num_probe: int | None) -> faiss.Index:
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"FAISS knows no index {factory!r} of {dim} dimensions: {_reason(error)}") from error
    if num_probe is not None:
        lists = faiss.try_extract_index_ivf(index)
        if lists is None:
            raise UserError(f"num_probe is for IVF indexes, {factory!r} has no lists to probe; leave it out")
        lists.nprobe = num_probe
    return index


def check_factory(dim: int, factory: str, num_probe: int | None, num_vectors: int) -> None:
    """Refuse (UserError) what `ShardedIndex.build` would: an unknown index, or one that so few vectors cannot train."""
    lists = faiss.try_extract_index_ivf(_empty_index(dim, factory, num_probe))
    if lists is not None and lists.nlist > num_vectors:
        raise UserError(f"the index {factory!r} has more lists than there are vectors ({num_vectors}); choose Flat")


def _train(index: faiss.Index, vectors: np.ndarray, world: World, factory: str, seed: int) -> np.ndarray:
    """The index, trained on rank 0, as bytes (n,) uint8 on every rank. A collective."""
    sample = _training_sample(index, vectors, world, seed)
    trained, problem = None, None
    if world.is_main:
        try:
            _place_lists(index, sample)
            index.train(sample)
            trained = faiss.serialize_index(index)
        except RuntimeError as error:
            problem = _reason(error)
    trained, problem = world.broadcast_object((trained, problem))
    if trained is None:
        raise UserError(f"the index {factory!r} cannot be trained: {problem}; choose a smaller one, or Flat")
    return trained


def _place_lists(index: faiss.Index, sample: np.ndarray) -> None:
    """Give many inverted lists their centres, by k-means of k-means; few ones, `index.train` does itself."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain  # a C++ vector, which FAISS's types call a list
        for number in range(chain.size()):
            transform = faiss.downcast_VectorTransform(chain.at(number))
            transform.train(sample)
            sample = transform.apply(sample)
        _place_lists(index.index, sample)
    elif isinstance(index, faiss.IndexIVF) and index.nlist > _ONE_LEVEL:
        centres = _centres(index, sample)
        index.quantizer.train(centres)
        index.quantizer.add(centres)


def _centres(index: Any, sample: np.ndarray) -> np.ndarray:
    """The centres (lists, d) of clusters of the clusters of `sample` (m, d), as many of each as it has vectors.

    `faiss.contrib.clustering.two_level_clustering` does the same, and fails where a cluster is too small to have one.
    """

    def clusters(of: np.ndarray, num: int) -> Any:
        settings = {"niter": index.cp.niter, "spherical": index.cp.spherical, "seed": index.cp.seed}
        means = faiss.Kmeans(of.shape[1], num, min_points_per_centroid=1, **settings)
        means.train(of)
        return means

    coarse = clusters(sample, int(index.nlist**0.5))
    _, member = coarse.assign(sample)
    ends = np.cumsum(np.bincount(member, minlength=coarse.k)) * index.nlist // len(sample)
    shares = np.diff(ends, prepend=0)
    parts = [clusters(sample[member == one], int(shares[one])).centroids for one in np.flatnonzero(shares)]
    return np.concatenate(parts)


def _training_sample(index: faiss.Index, vectors: np.ndarray, world: World, seed: int) -> np.ndarray:
    """Vectors to train with, chosen by id alone, in order of id: (m, d) on rank 0, none on the others."""
    counts = world.all_gather(np.array([len(vectors)], np.int64))
    bounds = np.concatenate([[0], np.cumsum(counts)])
    lists = faiss.try_extract_index_ivf(index)
    size = max(_TRAINING_SIZE, _PER_LIST * lists.nlist if lists else 0)
    chosen = np.sort(np.random.default_rng(seed).choice(bounds[-1], min(size, bounds[-1]), replace=False))
    edges = np.searchsorted(chosen, bounds)
    rows = chosen[edges[world.rank] : edges[world.rank + 1]] - bounds[world.rank]
    to_main = np.zeros_like(counts)
    to_main[0] = len(rows)
    from_all = np.diff(edges) if world.is_main else np.zeros_like(counts)
    return _exchange(vectors[rows], to_main, from_all, world)


def _exchange(array: np.ndarray, send: np.ndarray, receive: np.ndarray, world: World) -> np.ndarray:
    """Send the next `send[r]` rows of `array` to each rank r; what they send here, `receive[r]` rows, in rank order."""
    return world.all_to_all(torch.from_numpy(array), send.tolist(), receive.tolist()).numpy()


def _reason(error: RuntimeError) -> str:
    """What FAISS complains of, without the place in its source."""
    return str(error).rsplit(": ", 1)[-1].strip()
