"""The vectors of one rank and the search among them: FAISS proposes, exact scores decide.

FAISS's float32 scores depend on how its matrix product is blocked, hence on how many vectors and queries a rank
has. So FAISS is asked for more candidates than wanted, and they are scored again in float64, by a function of the
two vectors alone (docs/scanmix.md, "At full scale").
"""

from collections.abc import Callable
from functools import reduce

import faiss
import faiss.contrib.torch_utils  # lets FAISS take tensors
import torch
from torch import Tensor

# Candidates beyond the k wanted: exact search, where a rounding error could hide the k-th; and the factor of an
# approximate one, whose own order is rough (a product quantiser's above all).
EXTRA = 8
_REFINE = 4
# Candidates at most, as many as FAISS finds on a GPU: beyond that every vector is scored.
_MAX_CANDIDATES = 2048
MAX_K = _MAX_CANDIDATES // _REFINE
# Entries of the lists that a repeated search with more candidates keeps at once.
_NUM_ENTRIES = 1 << 20
# Terms of a block of scores: 2 MiB, about a core's cache; on a GPU enough to fill it.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 25}


class Shard:
    """Vectors (n, d) float32, finite, searched by inner product.

    Args:
        vectors: on the CPU, or on the GPU that is to search them.
        index: an empty trained FAISS index for approximate search, which takes the vectors in; None: exact search.
    """

    def __init__(self, vectors: Tensor, index: faiss.Index | None) -> None:
        self.vectors = vectors
        self._resources = faiss.StandardGpuResources() if vectors.is_cuda else None
        if index is not None:
            if self._resources is not None:
                index = faiss.index_cpu_to_gpu(self._resources, vectors.device.index, index)
            index.add(vectors)
        self._index = index
        self._longest = float(lengths(vectors).max()) if len(vectors) else 0.0

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k vectors of largest inner product with each query, by descending score, ties by ascending row.

        Args:
            queries: (b, d) float32 on the vectors' device.
            k: 1 or more.

        Returns:
            Scores float64 and rows int64, (b, min(k, n)); -inf and -1 where an approximate index found fewer.
        """
        k = min(k, len(self.vectors))
        if k and len(queries):
            return self._search(queries, k, k + EXTRA if self._index is None else _REFINE * k)
        nothing = torch.zeros(len(queries), k, device=queries.device)
        return nothing.double(), nothing.long()

    def _search(self, queries: Tensor, k: int, num: int) -> tuple[Tensor, Tensor]:
        """The best k of `num` candidates; of more where rounding could have kept one of the best out (duplicates)."""
        num = min(num, len(self.vectors))
        if self._index is None and num > _MAX_CANDIDATES:
            return self._scan(queries, k)
        rough, candidates = self._candidates(queries, num)
        scores, rows = best(queries, candidates, k, self._score)
        if self._index is not None or num == len(self.vectors):
            return scores, rows
        doubtful = (rough[:, -1].double() + rounding_error(queries, self._longest) >= scores[:, -1]).nonzero()[:, 0]
        if len(doubtful):  # often copies of one image: search each once
            distinct, which = torch.unique(queries[doubtful], dim=0, return_inverse=True)
            parts = torch.split(distinct, _NUM_ENTRIES // num)
            found = [self._search(part, k, 2 * num) for part in parts]
            for whole, column in zip((scores, rows), zip(*found, strict=True), strict=True):
                whole[doubtful] = torch.cat(column)[which]
        return scores, rows

    def _candidates(self, queries: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """What FAISS finds: float32 scores, descending, and rows, (b, num); row -1 where there is none."""
        if self._index is not None:
            return self._index.search(queries, num)
        if self._resources is not None:
            return faiss.knn_gpu(self._resources, queries, self.vectors, num, metric=faiss.METRIC_INNER_PRODUCT)
        return faiss.knn(queries, self.vectors, num, metric=faiss.METRIC_INNER_PRODUCT)

    def _score(self, queries: Tensor, rows: Tensor) -> Tensor:
        found = self.vectors.index_select(0, rows.clamp(min=0).flatten()).view(*rows.shape, -1)
        return dots(queries, found).masked_fill_(rows < 0, -torch.inf)

    def _scan(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The best k of all vectors, one query after the other."""
        num_rows = max(1, _BLOCK[queries.device.type] // queries.shape[1])
        found = []
        for query in torch.split(queries, 1):
            scores = torch.cat([dots(query, part[None])[0] for part in torch.split(self.vectors, num_rows)])
            rows = (scores >= scores.topk(k).values[-1]).nonzero()[:, 0]
            best, order = scores[rows].sort(descending=True, stable=True)
            found.append((best[:k], rows[order[:k]]))
        scores, rows = (torch.stack(column) for column in zip(*found, strict=True))
        return scores, rows


def settle_faiss() -> None:
    """Fit FAISS, whose settings are those of a process, to a rank that shares its node with others."""
    num_threads = torch.get_num_threads()
    faiss.omp_set_num_threads(num_threads)
    # Scores of this many queries with 1,024 vectors are computed at a time: by default 16 MiB, which do not fit a
    # cache that several ranks share.
    faiss.cvar.distance_compute_blas_query_bs = min(4096, 1024 * num_threads)
    # Below 128,000 / d queries FAISS would scan the vectors for each by itself: up to seven times slower.
    faiss.cvar.distance_compute_blas_threshold = 20


def best(
    queries: Tensor, candidates: Tensor, k: int, score: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The best k of each query's candidates (b, c), by `score` of queries and theirs: scores and rows (b, k)."""
    rows = candidates.sort(dim=1).values  # so that a stable sort by score leaves ties in ascending order
    num_queries = max(1, _BLOCK[queries.device.type] // (rows.shape[1] * queries.shape[1]))
    scores = torch.empty(rows.shape, dtype=torch.float64, device=queries.device)
    # Into place: small results kept among large blocks would keep glibc from using those again.
    for parts in zip(*(torch.split(whole, num_queries) for whole in (queries, rows, scores)), strict=True):
        parts[2].copy_(score(*parts[:2]))
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], rows.gather(1, order[:, :k])


def rounding_error(queries: Tensor, longest: float) -> Tensor:
    """How far float32 scores of each query (b, d) may be from ours, (b,), where no vector is longer than `longest`.

    However their products are added up.
    """
    # The classical bound on a float32 sum of d rounded products, a little enlarged for our own rounding; the constant
    # is for products so small that they are rounded to zero.
    dim = queries.shape[1]
    return lengths(queries) * (1.01 * (dim + 1) * 2.0**-24 * longest) + dim * 2.0**-126


def dots(queries: Tensor, vectors: Tensor) -> Tensor:
    """Inner products (b, c) float64 of float32 queries (b, d) with a list of float32 vectors each, (b, c, d).

    Products of float32 numbers are exact in float64. They are added pairwise in a fixed order, by elementwise
    operations only: a score's bits depend on the two vectors, not on the batch, the threads or the device.
    """
    terms = vectors.double().mul_(queries.double()[:, None])
    while (width := terms.shape[-1]) > 8:
        half = width // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        if width % 2:
            folded[..., 0] += terms[..., -1]
        terms = folded
    return reduce(torch.add, terms.unbind(-1))


def lengths(vectors: Tensor) -> Tensor:
    """Euclidean lengths (n,) float64 of float32 vectors (n, d), each a function of its own vector alone."""
    num_rows = max(1, _BLOCK[vectors.device.type] // vectors.shape[1])
    squares = torch.empty(len(vectors), dtype=torch.float64, device=vectors.device)
    for part, place in zip(torch.split(vectors, num_rows), torch.split(squares, num_rows), strict=True):
        place.copy_(dots(part, part[:, None])[:, 0])
    return squares.sqrt_()
