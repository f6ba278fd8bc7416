"""Time the input stream against bare decoding and against torchvision's ImageFolder with Pillow, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/input.py

The images are random crops of scikit-learn's two photographs: JPEG, short side 256, about 30 kB. Each turn reads the
same images `--passes` times and counts everything from the start of its worker processes to their end:

    stream            nldist: shuffled plan, batches of 64, two workers; uint8 batches reach the main process
    stream, cropped   the same, then a random crop of 224 and normalisation by `View` in the main process
    bare              two processes that only read and decode the same images in order, and throw them away
    ImageFolder       torchvision's ImageFolder (Pillow) and DataLoader, batches of 64, two workers, which make
                      the random crop of 224 and the normalisation

All share the machine's cores: the main process competes with the workers, as it does in training on a CPU. CPU time
(of the process and its workers) is recorded too, because a busy machine distorts it less. For all of them the C
library keeps freed memory, as it does in a run (`nldist.dist.memory`): else most of the time of cropping goes into
clearing fresh pages.
"""

import argparse
import io
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import record
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import Compose, Normalize, RandomCrop, ToTensor

from nldist.data.augment import spatial
from nldist.data.index import Index
from nldist.data.make.sources.folder import FolderSource
from nldist.data.make.writer import WriteOptions, write_split
from nldist.data.plan import Part, Plan, shuffled
from nldist.data.stream import Stream
from nldist.data.views import View
from nldist.dist.memory import keep_freed_memory

NUM_WORKERS, BATCH_SIZE, CROP = 2, 64, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PAIRS = (("stream", "bare", 0.92), ("stream, cropped", "ImageFolder", 2.8))


def make_images(directory: Path, num_images: int) -> None:
    """Write the images as directory/CLASS/NUMBER.jpg."""
    random = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(num_images):
        side = int(random.integers(200, 400))
        width = int(side * random.uniform(1, 1.5))
        photo = photos[number % len(photos)]
        left, top = (int(random.integers(n)) for n in (photo.width - width, photo.height - side))
        image = photo.crop((left, top, left + width, top + side))
        image = image.resize((round(width * 256 / side), 256), Image.Resampling.BICUBIC)
        for change in (ImageEnhance.Brightness, ImageEnhance.Color):
            image = change(image).enhance(random.uniform(0.7, 1.3))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=92)
        path = directory / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())


@dataclass(frozen=True)
class Repeated:
    """The steps of a plan, again and again."""

    plan: Plan
    num_steps: int

    def step(self, k: int) -> dict[str, Part]:
        """Step `k` modulo the plan's number of steps."""
        return self.plan.step(k % self.plan.num_steps)


def stream(index: Index, num_passes: int, view: View | None = None) -> None:
    """The input stream, with a view in the main process if given."""
    plan = shuffled(len(index), rank=0, size=1, batch_size=BATCH_SIZE, seed=0, epoch=0, window=1024)
    plan = Repeated(plan, plan.num_steps * num_passes)
    for batches in Stream(index, None, plan, num_workers=NUM_WORKERS):
        batch = batches["all"]
        if view is not None:
            view(batch.images, batch.sizes, batch.draws, (0,))


def bare(index: Index, num_passes: int) -> None:
    """Processes that read and decode an equal share each."""
    shares = np.array_split(np.arange(len(index)), NUM_WORKERS)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=decode, args=(index, share, num_passes)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def decode(index: Index, ids: np.ndarray, num_passes: int) -> None:
    """Read and decode the images of `ids` with as little around it as can be."""
    torch.set_num_threads(1)
    files = [os.open(path, os.O_RDONLY) for path in index.shards]
    places = list(zip(*(index.records[name][ids].tolist() for name in ("shard", "offset", "size")), strict=True))
    for _ in range(num_passes):
        for shard, offset, size in places:
            data = bytearray(os.pread(files[shard], size, offset))
            decode_image(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)


def image_folder(directory: Path, num_passes: int) -> None:
    """What most people use."""
    transform = Compose([RandomCrop(CROP), ToTensor(), Normalize(MEAN, STD)])
    images: ConcatDataset = ConcatDataset([ImageFolder(str(directory), transform)] * num_passes)
    for _ in DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=NUM_WORKERS):
        pass


def measure(turn: Callable[[], None], num_images: int) -> tuple[float, float]:
    """Images per second of wall-clock time and of CPU time, all processes together."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    turn()
    return num_images / (time.perf_counter() - wall), num_images / (cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """CPU time of this process and of those that it waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def prepare(directory: Path, num_images: int) -> Index:
    """The images, as files and as shards, made once."""
    if not (directory / "shards" / "dataset.json").exists():
        make_images(directory / "files", num_images)
        write_split(FolderSource(directory / "files"), directory / "shards", "train", WriteOptions(shard_size=500))
    return Index.open(directory / "shards", "train")


def main() -> None:
    """Measure, print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "nldist-benchmark-input")
    parser.add_argument("--num-images", type=int, default=2_000)
    parser.add_argument("--passes", type=int, default=10, help="passes over the images in each turn")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    args = parser.parse_args()
    args.work_dir /= str(args.num_images)
    keep_freed_memory()
    index = prepare(args.work_dir, args.num_images)
    view = View([spatial.RandomCrop(size=CROP)], MEAN, STD)
    contestants: dict[str, Callable[[], None]] = {
        "stream": lambda: stream(index, args.passes),
        "bare": lambda: bare(index, args.passes),
        "stream, cropped": lambda: stream(index, args.passes, view),
        "ImageFolder": lambda: image_folder(args.work_dir / "files", args.passes),
    }
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(args.repeats):
        for name, turn in contestants.items():
            turns[name].append(measure(turn, len(index) * args.passes))
    report(args, index, turns)


def report(args: argparse.Namespace, index: Index, turns: dict[str, list[tuple[float, float]]]) -> None:
    """Print medians and ratios, and write them to a dated file."""
    rates = {name: [median(column) for column in zip(*pairs, strict=True)] for name, pairs in turns.items()}
    print(f"{'images per second':20}{'wall':>10}{'CPU':>10}")
    for name, (wall, cpu) in rates.items():
        print(f"{name:20}{wall:10.0f}{cpu:10.0f}")
    ratios = {
        f"{ours} / {theirs}": {
            "wall": rates[ours][0] / rates[theirs][0],
            "cpu": rates[ours][1] / rates[theirs][1],
            "target": target,
        }
        for ours, theirs, target in PAIRS
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio['wall']:.2f} (CPU {ratio['cpu']:.2f}), target {ratio['target']}")
    results = {
        "num_images": len(index),
        "mean_bytes": float(index.size.mean()),
        "workers": NUM_WORKERS,
        "images_per_second": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in rates.items()},
        "turns": turns,
        "ratios": ratios,
    }
    print(
        f"written to {record.write('input', ['torch', 'torchvision', 'simplejpeg', 'pillow', 'webdataset'], results)}"
    )


if __name__ == "__main__":
    main()
