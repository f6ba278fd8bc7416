"""Time `nldist shard` on two processes against a plain single-process WebDataset writer, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/shard.py

The images are made of scikit-learn's two photographs: short side 256 (those of benchmarks/input.py), which go into the
shards as they are, and 500 x 400 and 1600 x 1200 pixels, which are shrunk to 256. Each stands under several names
(hard links). Every turn lists, shuffles and writes all of them, the start of processes included:

    reference       webdataset.ShardWriter in a loop over the files, ours; to shrink: Pillow's decoder and Lanczos
                    filter, JPEG of quality 95 without subsampling, as nldist has it. It checks nothing, has no index,
                    no checksums, and leaves the file to the operating system
    nldist          `write_split` with two workers, as the command does it: every image decoded
    nldist, header  the same with --check header
    ..., alone      the same in one process

CPU time is that of all processes together. Where others use the cores, too, only it tells what n free ones would give:
n times the ratio of those alone. Then what an image costs, step by step, in one process.
"""

import argparse
import hashlib
import io
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import record
from PIL import Image, ImageEnhance

from nldist.data.make import shards
from nldist.data.make.images import Encoded, Limits, normalise
from nldist.data.make.sources.base import read_file
from nldist.data.make.sources.folder import FolderSource
from nldist.data.make.writer import WriteOptions, write_split

# Workers import this file, too: what they have no use for, such as torch, is imported where it is used.
SHARD_SIZE, RESIZE, LIMITS = 1000, 256, Limits()
KINDS = {"256": (2_000, 10), "500x400": (400, 10), "1600x1200": (40, 10)}  # photographs, and names of each
TARGETS = {"256": 5.0, "500x400": 2.0}


def make_photos(directory: Path, num_images: int, width: int, height: int) -> None:
    """Write photographs of this size as directory/CLASS/NUMBER.jpg."""
    from sklearn.datasets import load_sample_images

    random = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(num_images):
        photo = photos[number % len(photos)]
        zoom = random.uniform(1, 1.3) * max(width / photo.width, height / photo.height)
        left, top = random.uniform(0, photo.width - width / zoom), random.uniform(0, photo.height - height / zoom)
        box = (left, top, left + width / zoom, top + height / zoom)
        image = photo.resize((width, height), Image.Resampling.BICUBIC, box)
        image = ImageEnhance.Brightness(image).enhance(random.uniform(0.7, 1.3))
        path = directory / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "JPEG", quality=90)


def prepare(directory: Path, kind: str, scale: float) -> Path:
    """The files of a kind, made once, under all their names."""
    from input import make_images

    num_images, num_names = round(KINDS[kind][0] * scale), KINDS[kind][1]
    files = directory / f"{kind}-{num_images}"
    if not files.exists():
        aside = directory / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        if kind == "256":
            make_images(aside, num_images)
        else:
            make_photos(aside, num_images, *map(int, kind.split("x")))
        for path in sorted(aside.rglob("*.jpg")):
            for name in range(1, num_names):
                os.link(path, path.with_stem(f"{path.stem}-{name}"))
        aside.rename(files)
    return files


def reference(files: Path, out: Path, resize: int | None) -> None:
    """What one writes with WebDataset's own means."""
    from webdataset import ShardWriter

    paths = sorted(path for path in files.rglob("*") if path.is_file())
    classes = {name: label for label, name in enumerate(sorted({path.parent.name for path in paths}))}
    out.mkdir()
    with ShardWriter(str(out / "%06d.tar"), maxcount=SHARD_SIZE, verbose=0, opener=partial(open, mode="wb")) as shards:
        for number in np.random.default_rng(0).permutation(len(paths)):
            path = paths[number]
            data = path.read_bytes() if resize is None else shrunk(path.read_bytes(), resize)
            key = f"{path.parent.name}/{path.stem}"
            shards.write({"__key__": key, "jpg": data, "cls": classes[path.parent.name]})


def shrunk(data: bytes, resize: int) -> bytes:
    """Decoded, shrunk and encoded with Pillow alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = resize / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def ours(files: Path, out: Path, **options: Any) -> None:
    """`nldist shard folder`."""
    write_split(FolderSource(files), out, "train", WriteOptions(shard_size=SHARD_SIZE, **options))


def contestants(kind: str, files: Path, out: Path) -> dict[str, Callable[[], None]]:
    """The calls that take turns."""
    resize = None if kind == "256" else RESIZE
    calls: dict[str, Callable[[], None]] = {
        "reference": lambda: reference(files, out, resize),
        "nldist": lambda: ours(files, out, resize=resize, num_workers=2),
    }
    if resize is None:
        calls["nldist, header"] = lambda: ours(files, out, num_workers=2, check="header")
        calls["nldist, header, alone"] = lambda: ours(files, out, check="header")
    calls["nldist, alone"] = lambda: ours(files, out, resize=resize)
    return calls


def take_turns(kind: str, files: Path, out: Path, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Images per second of wall-clock and of CPU time, for each turn."""
    from input import measure

    num_images = sum(1 for path in files.rglob("*") if path.is_file())
    calls = contestants(kind, files, out)
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            turns[name].append(measure(call, num_images))
            shutil.rmtree(out)
    return turns


def start_seconds(directory: Path, files: Path, out: Path) -> float:
    """What a turn of ours costs whatever the number of images: one with two shards of an image."""
    few = directory / "few"
    for number, path in enumerate(sorted(files.rglob("*.jpg"))[:2]):
        (few / f"class{number}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, few / f"class{number}")
    begin = time.perf_counter()
    write_split(FolderSource(few), out, "train", WriteOptions(shard_size=1, num_workers=2))
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    return seconds


def costs(kind: str, files: Path) -> dict[str, float]:
    """Microseconds of CPU time that each step takes for an image: medians of five turns."""
    from webdataset import TarWriter

    paths = sorted(files.rglob("*.jpg"))[:: KINDS[kind][1]][:200]
    raw = [path.read_bytes() for path in paths]
    resize = None if kind == "256" else RESIZE
    images = [normalise(data, LIMITS, resize) for data in raw]
    shard, tar = shards.ShardWriter(io.BytesIO()), TarWriter(io.BytesIO())

    def add_theirs(image: Encoded) -> None:
        tar.write({"__key__": "class0/00000", "jpg": image.data, "cls": 0})

    steps: dict[str, tuple[Callable[[Any], object], Sequence[Any]]] = {
        "read": (lambda path: read_file(path, LIMITS.max_bytes), paths),
        "decode in full": (lambda data: Image.open(io.BytesIO(data)).load(), raw),
        "normalise": (lambda data: normalise(data, LIMITS, resize), raw),
        "normalise, header": (lambda data: normalise(data, LIMITS, resize, "header"), raw),
        "crc32": (lambda image: zlib.crc32(image.data), images),
        "sha256": (lambda image: hashlib.sha256(image.data).digest(), images),
        "into the tar, checksums included": (lambda image: shard.add("class0/00000", image, 0), images),
        "into the tar, webdataset": (add_theirs, images),
    }
    if resize is not None:
        steps["decode, shrink, encode, Pillow"] = (lambda data: shrunk(data, resize), raw)
        del steps["normalise, header"]
    return {name: median(_microseconds(*step) for _ in range(5)) for name, step in steps.items()}


def _microseconds(step: Callable[[Any], object], arguments: Sequence[Any]) -> float:
    begin = time.process_time()
    for argument in arguments:
        step(argument)
    return (time.process_time() - begin) / len(arguments) * 1e6


def report(kind: str, turns: dict[str, list[tuple[float, float]]], steps: dict[str, float]) -> dict[str, Any]:
    """Print a table; returns what is to be recorded."""
    rates = {name: [median(column) for column in zip(*pairs, strict=True)] for name, pairs in turns.items()}
    print(f"\n{kind + ', images per second':32}{'wall':>10}{'CPU':>10}{'to reference':>20}")
    ratios = {}
    for name, (wall, cpu) in rates.items():
        pairs = zip(turns[name], turns["reference"], strict=True)
        of_wall, of_cpu = (median(column) for column in zip(*((a / c, b / d) for (a, b), (c, d) in pairs), strict=True))
        ratios[name] = {"wall": of_wall, "cpu": of_cpu}
        print(f"{name:32}{wall:10.0f}{cpu:10.0f}{of_wall:10.2f}{of_cpu:10.2f}")
    print(f"{'microseconds of CPU':32}")
    for name, microseconds in steps.items():
        print(f"  {name:40}{microseconds:8.0f}")
    return {
        "images_per_second": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in rates.items()},
        "ratio_to_reference": ratios,
        "target": TARGETS.get(kind),
        "microseconds_of_cpu": steps,
        "turns": turns,
    }


def main() -> None:
    """Measure, print tables and record them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "nldist-benchmark-shard")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of images")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    out = args.work_dir / "out"
    shutil.rmtree(out, ignore_errors=True)
    results: dict[str, Any] = {"reference": "ours: a loop around webdataset.ShardWriter, in one process", "kinds": {}}
    for kind in KINDS:
        files = prepare(args.work_dir, kind, args.scale)
        turns = take_turns(kind, files, out, args.repeats)
        results["kinds"][kind] = report(kind, turns, costs(kind, files))
    results["start_seconds"] = median(start_seconds(args.work_dir, files, out) for _ in range(3))
    print(f"start and end of a command with two workers: {results['start_seconds']:.2f} s")
    print(f"written to {record.write('shard', ['pillow', 'webdataset', 'pyarrow'], results)}")


if __name__ == "__main__":
    main()
