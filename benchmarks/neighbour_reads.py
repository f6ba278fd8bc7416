"""What reading neighbours costs: the stream with anchors alone against anchors and one neighbour of each.

    OMP_NUM_THREADS=1 python benchmarks/neighbour_reads.py

The images are those of benchmarks/input.py (JPEG, short side 256, about 30 kB), in shards of about 30 MB. Both streams
deliver the same number of images per step, with two workers: 128 anchors in windows of 1,024 records, or 64 such
anchors and 64 neighbours. The neighbours are the worst case: drawn from the whole set, so that every read of one is
somewhere else. Turns alternate, with the shards in the page cache and, by turns, dropped from it.
Leaves benchmarks/results/neighbour-reads-DATE.json.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
from input import make_images

from nldist.data.index import Index
from nldist.data.make.sources.folder import FolderSource
from nldist.data.make.writer import WriteOptions, write_split
from nldist.data.neighbour_plan import neighbours
from nldist.data.plan import Plan, shuffled
from nldist.data.stream import Stream

NUM_WORKERS, BATCH_SIZE, WINDOW = 2, 128, 1024


def plans(index: Index, graph: Path) -> dict[str, Plan]:
    """The two streams' plans over the same anchors."""
    settings: dict[str, Any] = {"rank": 0, "size": 1, "seed": 0, "epoch": 0, "window": WINDOW}
    return {
        "anchors": shuffled(len(index), batch_size=BATCH_SIZE, **settings),
        "anchors and neighbours": neighbours(len(index), graph, batch_size=BATCH_SIZE // 2, **settings),
    }


def images_per_second(index: Index, plan: Plan) -> float:
    """Rate of one pass over the plan, from the start of the workers to their end."""
    began = time.perf_counter()
    stream = Stream(index, None, plan, num_workers=NUM_WORKERS)
    for _ in stream:
        pass
    return stream.num_images / (time.perf_counter() - began)


def drop_from_cache(index: Index) -> None:
    """Ask the system to forget the shards' pages."""
    for shard in index.shards:
        file = os.open(shard, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def main() -> None:
    """Make the images, take turns, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=8000)
    parser.add_argument("--num-repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, root, graph = (Path(temporary) / name for name in ("folder", "shards", "graph.npy"))
        make_images(folder, options.num_images)
        write_split(FolderSource(folder), root, "train", WriteOptions(shard_size=1000))
        index = Index.open(root, "train")
        np.save(graph, np.random.default_rng(0).integers(len(index), size=(len(index), 20), dtype=np.int32))
        rates: dict[str, list[float]] = {}
        for _ in range(options.num_repeats):
            for cache in ("in the page cache", "from the disk"):
                for name, plan in plans(index, graph).items():
                    if cache == "from the disk":
                        drop_from_cache(index)
                    rates.setdefault(f"{name}, {cache}", []).append(images_per_second(index, plan))
    medians = {name: median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:45} {value:8,.0f} images/s")
    ratios = {
        cache: medians[f"anchors and neighbours, {cache}"] / medians[f"anchors, {cache}"]
        for cache in ("in the page cache", "from the disk")
    }
    print("ratios:", {cache: round(ratio, 3) for cache, ratio in ratios.items()})
    results = {"num_images": options.num_images, "images_per_second": medians, "ratios": ratios, "turns": rates}
    print(f"recorded in {record.write('neighbour-reads', ['torch', 'torchvision', 'webdataset'], results)}")


if __name__ == "__main__":
    main()
