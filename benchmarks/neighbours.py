"""Time the sharded neighbour search on synthetic vectors: real processes, one thread each.

python benchmarks/neighbours.py exact    two ranks against one stock FAISS process with two threads, taking turns
python benchmarks/neighbours.py ivf      an inverted file over a million vectors: time, recall, memory

With OMP_WAIT_POLICY=passive threads that wait for each other use no CPU time, so that CPU seconds can be compared
on a busy machine too.
"""

import argparse
import multiprocessing
import os
import resource
import socket
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import faiss
import numpy as np
import record

from nldist.data.index import owned
from nldist.dist.world import World
from nldist.estimate.neighbours import ShardedIndex

NUM_CLUSTERS = 1_000
FIGURES = (
    "seconds_build",
    "seconds_search",
    "cpu_seconds_search",
    "seconds_build_stock",
    "seconds_search_stock",
    "cpu_seconds_search_stock",
)
_BLOCK = 10_000


def vectors(rows: range, dim: int) -> np.ndarray:
    """Rows of an endless synthetic set, (b, dim) float32 of length 1: a mixture of Gaussians.

    The spread falls off over the dimensions, within clusters and between them, as it does in learned features.
    """
    spread = (1.0 + np.arange(dim)) ** -0.5
    centres = np.random.default_rng(0).normal(size=(NUM_CLUSTERS, dim))
    parts = [np.empty((0, dim), np.float32)]
    for block in range(rows.start // _BLOCK, -(-rows.stop // _BLOCK)):
        random = np.random.default_rng([1, block])
        members = centres[random.integers(NUM_CLUSTERS, size=_BLOCK)]
        points = (members + 0.7 * random.normal(size=members.shape)) * spread
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        start = block * _BLOCK
        parts.append(points[max(rows.start - start, 0) : rows.stop - start].astype(np.float32))
    return np.concatenate(parts)


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any) -> list[Any]:
    """Run `function(world, *args)` on new processes that form a world; their results in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(num_ranks, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_rank, rank, num_ranks, port, function, args) for rank in range(num_ranks)]
        return [rank.result() for rank in ranks]


def _rank(rank: int, num_ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ |= {name: str(value) for name, value in facts.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with World.start(num_threads=1, device="cpu") as world:
        return function(world, *args)


def search_sharded(world: World, args: argparse.Namespace) -> tuple[float, float, float, np.ndarray]:
    """Seconds to index this rank's vectors and to search for some of them, CPU seconds of the search; the ids found."""
    own = vectors(owned(args.num_vectors, world.rank, world.size), args.dim)
    world.barrier()
    start = time.perf_counter()
    index = ShardedIndex.build(own, world)
    built, cpu = time.perf_counter(), time.process_time()
    _, ids = index.search(own[: args.num_queries // world.size], args.k)
    cpu = time.process_time() - cpu
    world.barrier()
    return built - start, time.perf_counter() - built, cpu, ids


def search_stock(_: World, args: argparse.Namespace) -> tuple[float, float, float, np.ndarray]:
    """The same by one stock FAISS index with as many threads as there are ranks on the other side."""
    everything = vectors(range(args.num_vectors), args.dim)
    shares = (owned(args.num_vectors, rank, args.num_ranks) for rank in range(args.num_ranks))
    queries = np.concatenate([everything[share][: args.num_queries // args.num_ranks] for share in shares])
    faiss.omp_set_num_threads(args.num_ranks)
    start = time.perf_counter()
    index = faiss.IndexFlatIP(args.dim)
    index.add(everything)
    built, cpu = time.perf_counter(), time.process_time()
    ids = index.search(queries, args.k)[1]
    return built - start, time.perf_counter() - built, time.process_time() - cpu, ids


def exact(args: argparse.Namespace) -> dict[str, Any]:
    """Ours and the stock index in turn: medians, every turn, and how often they name another neighbour."""
    turns = []
    for turn in range(args.num_repeats):
        sharded = run_ranks(search_sharded, args.num_ranks, args)
        (stock,) = run_ranks(search_stock, 1, args)
        build, search, cpu = zip(*(rank[:3] for rank in sharded), strict=True)
        turns.append((max(build), max(search), sum(cpu), *stock[:3]))
        print(f"turn {turn + 1}", *(f"{value:.2f}" for value in turns[-1]), flush=True)
    medians = [median(column) for column in zip(*turns, strict=True)]
    ids = np.concatenate([rank[3] for rank in sharded])
    return {
        **dict(zip(FIGURES, medians, strict=True)),
        "ratio_search": medians[1] / medians[4],
        "ratio_cpu": medians[2] / medians[5],
        "num_queries": len(ids),
        "queries_per_second": len(ids) / medians[1],
        "share_of_lists_in_another_order": float((ids != stock[3]).any(axis=1).mean()),
        "share_of_other_neighbours": 1 - recall(ids, stock[3]),
        "turns": [dict(zip(FIGURES, turn, strict=True)) for turn in turns],
    }


def search_lists(world: World, args: argparse.Namespace) -> dict[str, float]:
    """Build and search an inverted file over all ranks, and compare a sample of its lists with the exact ones."""
    own = vectors(owned(args.num_vectors, world.rank, world.size), args.dim)
    before = _peak_mib()
    world.barrier()
    start = time.perf_counter()
    index = ShardedIndex.build(own, world, factory=args.factory, num_probe=args.num_probe)
    built = time.perf_counter()
    _, ids = index.search(own, args.k)
    world.barrier()
    searched = time.perf_counter()
    after = _peak_mib()
    sample = np.random.default_rng(2).choice(len(own), args.num_checked // world.size, replace=False)
    _, expected = ShardedIndex.build(own, world).search(own[sample], args.k)
    return {
        "seconds_build": built - start,
        "seconds_search": searched - built,
        "recall": recall(ids[sample], expected),
        "mib_vectors": own.nbytes / 2**20,
        "peak_mib_before": before,
        "peak_mib": after,
    }


def ivf(args: argparse.Namespace) -> dict[str, Any]:
    """The inverted file's figures, per rank where they differ."""
    ranks = run_ranks(search_lists, args.num_ranks, args)
    seconds = max(rank["seconds_search"] for rank in ranks)
    return {
        "factory": args.factory,
        "num_probe": args.num_probe,
        "seconds_build": max(rank["seconds_build"] for rank in ranks),
        "seconds_search": seconds,
        "queries_per_second": args.num_vectors / seconds,
        "recall": float(np.mean([rank["recall"] for rank in ranks])),
        "ranks": ranks,
    }


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the wanted neighbours (b, k) that are among those found (b, k)."""
    hits = sum(len(np.intersect1d(*lists)) for lists in zip(found, wanted, strict=True))
    return hits / wanted.size


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="name", required=True)
    for name, num_vectors in (("exact", 200_000), ("ivf", 1_000_000)):
        command = commands.add_parser(name)
        command.add_argument("--num-vectors", type=int, default=num_vectors)
        command.add_argument("--dim", type=int, default=128)
        command.add_argument("--k", type=int, default=21)
        command.add_argument("--num-ranks", type=int, default=2)
    commands.choices["exact"].add_argument("--num-queries", type=int, default=200_000)
    commands.choices["exact"].add_argument("--num-repeats", type=int, default=5)
    commands.choices["ivf"].add_argument("--factory", default="IVF4096,Flat")
    commands.choices["ivf"].add_argument("--num-probe", type=int, default=16)
    commands.choices["ivf"].add_argument("--num-checked", type=int, default=1_000)
    args = parser.parse_args()
    results = {"exact": exact, "ivf": ivf}[args.name](args)
    for key, value in results.items():
        print(f"{key:>32} {value}")
    data = f"synthetic: {args.num_vectors} x {args.dim}, mixture of {NUM_CLUSTERS} Gaussians, length 1"
    packages = ["faiss-gpu", "numpy", "torch"]
    setting = {"data": data, "k": args.k, "num_ranks": args.num_ranks, "threads_per_rank": 1}
    print(f"written to {record.write(f'neighbours-{args.name}', packages, setting | results)}")


if __name__ == "__main__":
    main()
