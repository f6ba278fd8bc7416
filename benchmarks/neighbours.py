"""Time the sharded neighbour search on synthetic vectors, on real processes.

python benchmarks/neighbours.py exact    the graph of a set with itself: one rank of two threads and two ranks of one
                                         against one stock FAISS process with two threads, taking turns
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
from nldist.estimate.graph import every_neighbour
from nldist.estimate.neighbours import ShardedIndex, others

NUM_CLUSTERS = 1_000
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


def run_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, num_threads: int = 1) -> list[Any]:
    """Run `function(world, *args)` on new processes that form a world; their results in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ProcessPoolExecutor(num_ranks, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_rank, rank, num_ranks, num_threads, port, function, args) for rank in range(num_ranks)]
        return [rank.result() for rank in ranks]


def _rank(
    rank: int, num_ranks: int, num_threads: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ |= {name: str(value) for name, value in facts.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with World.start(num_threads=num_threads, device="cpu") as world:
        return function(world, *args)


def graph_by_pairs(world: World, args: argparse.Namespace) -> tuple[float, float, np.ndarray]:
    """Seconds and CPU seconds to index this rank's vectors and to find the neighbours of all; those, (owned, k - 1)."""
    own = vectors(owned(args.num_vectors, world.rank, world.size), args.dim)
    every_neighbour(ShardedIndex.build(own[:100], world), 1)  # imports, and compiles once for all turns
    world.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    graph = every_neighbour(ShardedIndex.build(own, world), args.k - 1)
    cpu = time.process_time() - cpu
    world.barrier()
    return time.perf_counter() - start, cpu, graph


def graph_by_faiss(_: World, args: argparse.Namespace) -> tuple[float, float, np.ndarray]:
    """The same by one stock FAISS index with as many threads."""
    everything = vectors(range(args.num_vectors), args.dim)
    faiss.omp_set_num_threads(args.num_threads)
    start, cpu = time.perf_counter(), time.process_time()
    index = faiss.IndexFlatIP(args.dim)
    index.add(everything)
    found = index.search(everything, args.k)[1]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seconds, cpu, others(found, np.arange(len(found)))


def exact(args: argparse.Namespace) -> dict[str, Any]:
    """The stock index, one rank with all threads, and as many ranks of one thread, in turn: medians, every turn."""
    runs: dict[str, tuple[Callable[..., Any], int, int]] = {
        "faiss": (graph_by_faiss, 1, args.num_threads),
        "one_rank": (graph_by_pairs, 1, args.num_threads),
        "ranks": (graph_by_pairs, args.num_threads, 1),
    }
    turns: list[dict[str, float]] = []
    graphs: dict[str, np.ndarray] = {}
    for turn in range(args.num_repeats):
        turns.append({})
        for name, (function, num_ranks, num_threads) in runs.items():
            seconds, cpu, parts = zip(*run_ranks(function, num_ranks, args, num_threads=num_threads), strict=True)
            turns[-1] |= {f"seconds_{name}": max(seconds), f"cpu_seconds_{name}": sum(cpu)}
            graphs[name] = np.concatenate(parts)
        print(f"turn {turn + 1}", *(f"{key} {value:.2f}" for key, value in turns[-1].items()), flush=True)
    medians = {key: median(turn[key] for turn in turns) for key in turns[0]}
    ratios = {
        f"{what}_of_faiss_by_{name}": medians[f"{what}_faiss"] / medians[f"{what}_{name}"]
        for what in ("seconds", "cpu_seconds")
        for name in ("one_rank", "ranks")
    }
    return {
        **medians,
        **ratios,
        "same_graph": bool((graphs["one_rank"] == graphs["ranks"]).all()),
        "share_of_faiss_lists_in_another_order": float((graphs["ranks"] != graphs["faiss"]).any(axis=1).mean()),
        "share_of_faiss_neighbours_that_are_others": 1 - recall(graphs["ranks"], graphs["faiss"]),
        "turns": turns,
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
    commands.choices["ivf"].add_argument("--num-ranks", type=int, default=2)
    commands.choices["exact"].add_argument("--num-threads", type=int, default=2)
    commands.choices["exact"].add_argument("--num-repeats", type=int, default=5)
    commands.choices["ivf"].add_argument("--factory", default="IVF4096,Flat")
    commands.choices["ivf"].add_argument("--num-probe", type=int, default=16)
    commands.choices["ivf"].add_argument("--num-checked", type=int, default=1_000)
    args = parser.parse_args()
    results = {"exact": exact, "ivf": ivf}[args.name](args)
    for key, value in results.items():
        print(f"{key:>32} {value}")
    data = f"synthetic: {args.num_vectors} x {args.dim}, mixture of {NUM_CLUSTERS} Gaussians, length 1"
    packages = ["faiss-gpu", "numba", "numpy", "torch"]
    setting = {"data": data, "k": args.k} | (
        {"threads": args.num_threads} if args.name == "exact" else {"num_ranks": args.num_ranks, "threads_per_rank": 1}
    )
    print(f"written to {record.write(f'neighbours-{args.name}', packages, setting | results)}")


if __name__ == "__main__":
    main()
