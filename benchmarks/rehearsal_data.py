"""The images of benchmarks/rehearsal.py: crops of two photographs, 16 to 32 pixels, as WebDataset tars.

    python benchmarks/rehearsal_data.py FOLDER 2400000

Crops of scikit-learn's two sample photographs, each encoded for itself: place, size and quality differ. A class is a
place in a photograph. Class sizes are long-tailed: at 2.4 M from some 440 to some 26,000. Leaves FOLDER/train-*.tar,
FOLDER/test-*.tar and FOLDER/classes.txt.
"""

import argparse
import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

NUM_CLASSES, NUM_TEST = 1000, 4000
DIM = 128  # features of small_cnn
_PER_TAR = 5000
_STEEPNESS, _FLAT_RANKS = 1.3, 45  # of the class sizes: (rank + 45)^-1.3
_JITTER = 6  # pixels around the class's place


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_samples", type=int)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "classes.txt").write_text("".join(f"place{number:04d}\n" for number in range(NUM_CLASSES)))
    jobs = [*_jobs("train", options.num_samples), *_jobs("test", NUM_TEST)]
    with ProcessPoolExecutor(2) as pool:
        for _ in pool.map(partial(write_tar, options.folder), jobs):
            pass


def _jobs(split: str, num_samples: int) -> Iterator[tuple[str, range]]:
    for start in range(0, num_samples, _PER_TAR):
        yield split, range(start, min(start + _PER_TAR, num_samples))


def factory(num_samples: int) -> str:
    """An inverted file with 256 samples in a list, so that the time of a search does not grow worse than N.

    A graph finds the lists. Half a byte per number: candidates are scored again with the vectors themselves.
    """
    return f"IVF{max(16, num_samples // 256)}_HNSW32,SQ4"


def write_tar(folder: Path, job: tuple[str, range]) -> None:
    """Write the tar of these samples of a split, which are the same whatever else is written."""
    split, numbers = job
    path = folder / f"{split}-{numbers.start // _PER_TAR:05d}.tar"
    if path.exists():
        return
    from sklearn.datasets import load_sample_images  # not by who only asks for the number of classes

    photographs = load_sample_images().images
    random = np.random.default_rng([split == "test", numbers.start])
    weights = (np.arange(NUM_CLASSES) + _FLAT_RANKS) ** -_STEEPNESS
    places = np.random.default_rng(0).uniform(size=(NUM_CLASSES, 2))
    labels = random.choice(NUM_CLASSES, len(numbers), p=weights / weights.sum())
    aside = path.with_suffix(".part")
    with aside.open("wb") as file:
        for number, label in zip(numbers, labels.tolist(), strict=True):
            _append(file, f"{split}/{number:09d}.jpg", _crop(photographs[label % 2], places[label], random))
            _append(file, f"{split}/{number:09d}.cls", b"%d" % label)
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    aside.replace(path)


def _crop(photograph: np.ndarray, place: np.ndarray, random: np.random.Generator) -> bytes:
    """A JPEG file of a place (of shares of the height and the width) in a photograph."""
    from PIL import Image

    height, width, quality = random.integers([16, 16, 60], [33, 33, 96]).tolist()
    jitter = random.integers(0, 2 * _JITTER + 1, 2)
    top, left = (place * (np.array(photograph.shape[:2]) - 32 - 2 * _JITTER) + jitter).astype(int).tolist()
    file = io.BytesIO()
    Image.fromarray(photograph[top : top + height, left : left + width]).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _append(file: io.BufferedWriter, name: str, data: bytes) -> None:
    """A member, written by hand: tarfile takes several times as long."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    file.write(member.tobuf(tarfile.USTAR_FORMAT))
    file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))


if __name__ == "__main__":
    main()
