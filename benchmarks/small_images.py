"""The stream of images of 32 x 32 pixels on one core, decoded and kept decoded, against nldist 0.1 and bare decoding.

    OMP_NUM_THREADS=1 python benchmarks/small_images.py

The images are 50,000 crops of scikit-learn's two photographs, JPEG, about 1 kB. Each measurement is a process of its
own, which reads all of them in batches of 128 in a shuffled order, without workers, and takes turns with the others:

    0.1       the stream of nldist 0.1 (commit c551f53, in a work tree of its own)
    now       the present one
    kept      the present one with data.decoded_cache_gib, whose file an epoch before has filled
    first     the epoch that fills it
    bare      reading and decoding alone (torchvision), in the order of the shards

CPU seconds of the process while it streams. Leaves benchmarks/results/small-images-DATE.json.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import record
from PIL import Image
from sklearn.datasets import load_sample_images
from start import BEFORE, REPOSITORY, checkout

from nldist.data.make.sources.folder import FolderSource
from nldist.data.make.writer import WriteOptions, write_split

PROGRAM = """
import sys, time
from pathlib import Path
import torch
import nldist
from nldist.data.index import Index
from nldist.data.plan import shuffled
from nldist.data.stream import Stream

assert Path(nldist.__file__).parent.parent.samefile(Path.cwd()), nldist.__file__
torch.set_num_threads(1)
what, root, folder = sys.argv[1], *map(Path, sys.argv[2:])
index, settings = Index.open(root, "train"), {}
plan = shuffled(len(index), rank=0, size=1, batch_size=128, seed=0, epoch=0, window=16384)
if what in ("kept", "first"):
    from nldist.data.decoded import decoded_cache
    settings["decoded"] = decoded_cache(index, 512, folder, 2**30)
if what == "bare":
    import os, torchvision.io
begin = time.process_time()
if what == "bare":
    files = [os.open(path, os.O_RDONLY) for path in index.shards]
    for shard, offset, size in zip(index.shard.tolist(), index.offset.tolist(), index.size.tolist()):
        data = torch.frombuffer(bytearray(os.pread(files[shard], size, offset)), dtype=torch.uint8)
        torch.ops.image.decode_image(data, 3, True)
else:
    assert sum(len(batches["all"].ids) for batches in Stream(index, None, plan, **settings)) == len(index)
print(len(index) / (time.process_time() - begin))
"""


def make_images(folder: Path, num_images: int) -> None:
    """Write the images as folder/CLASS/NUMBER.jpg."""
    random, photos = np.random.default_rng(0), [Image.fromarray(photo) for photo in load_sample_images().images]
    for number in range(num_images):
        photo, side = photos[number % 2], int(random.integers(32, 200))
        left, top = (int(random.integers(length - side)) for length in (photo.width, photo.height))
        image = photo.resize((32, 32), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=92)
        path = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())


def rate(tree: Path, what: str, root: Path, folder: Path) -> float:
    """Images per CPU second of one process that runs the code in `tree`."""
    command = [sys.executable, "-c", PROGRAM, what, str(root), str(folder)]
    # Of the work tree: python -c looks for modules in its working directory first.
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    """Measure in turns, print and record medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, checkout(BEFORE, Path(name) / "before") as before:
        work = Path(name)
        make_images(work / "images", options.num_images)
        write_split(FolderSource(work / "images"), work / "set", "train", WriteOptions())
        trees = {"0.1": before, **dict.fromkeys(("now", "first", "kept", "bare"), REPOSITORY)}
        rates: dict[str, list[float]] = {what: [] for what in trees}
        for turn in range(options.turns):
            for what, tree in trees.items():
                folder = work / f"kept{turn}"
                rates[what].append(rate(tree, "now" if what == "0.1" else what, work / "set", folder))
            print({what: round(values[-1]) for what, values in rates.items()}, flush=True)
    medians = {what: median(values) for what, values in rates.items()}
    ratios = {f"{what} / {other}": medians[what] / medians[other] for what, other in PAIRS}
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    results = {"images_per_cpu_second": rates, "medians": medians, "ratios": ratios}
    print(f"recorded in {record.write('small-images', ['torch', 'torchvision', 'simplejpeg', 'webdataset'], results)}")


PAIRS = (("kept", "0.1"), ("now", "0.1"), ("now", "bare"), ("first", "now"))

if __name__ == "__main__":
    main()
