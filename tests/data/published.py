"""Published data sets made small, laid out as they are distributed."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLOTHES = (
    "T-Shirt", "Shirt", "Knitwear", "Chiffon", "Sweater", "Hoodie", "Windbreaker",
    "Jacket", "Down Coat", "Suit", "Shawl", "Dress", "Vest", "Underwear",
)  # fmt: skip
SYNSETS = (
    "n01440764 tench, Tinca tinca",
    "n01443537 goldfish, Carassius auratus",
    "n02012849 crane",
    "n03126707 crane",
)
UNLABELLED = "images/2/26/3761328114,905362226.jpg"  # in the real clean_train list; no label file has it


def jpeg(path: Path, number: int = 0, side: int = 12) -> Path:
    """A real JPEG of one colour, with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (number * 31 % 256, number * 57 % 256, number * 7 % 256)
    Image.new("RGB", (side, side), colour).save(path, "JPEG")
    return path


def lines(path: Path, rows: Iterable[str], end: str = "\n") -> Path:
    """A text file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{row}{end}" for row in rows).encode())
    return path


def clothing_keys(split: str) -> list[str]:
    """The keys of a split of `clothing1m`: every one has a comma."""
    number = {"train": 0, "clean_train": 1, "val": 2, "test": 3}[split]
    count = {"train": 40, "clean_train": 12, "val": 14, "test": 14}[split]
    return [f"images/{row % 10}/{number}{row % 10}/{1000 + row},{number}{row}.jpg" for row in range(count)]


def clothing1m(root: Path, annotations: str = ".", images: str = "images") -> Path:
    """Clothing1M with 80 images; half of the clean ones have a noisy label, too; one has no label at all."""
    folder = root / annotations
    lists = {
        "noisy_train": clothing_keys("train"),
        "clean_train": [*clothing_keys("clean_train"), UNLABELLED],
        "clean_val": clothing_keys("val"),
        "clean_test": clothing_keys("test"),
    }
    for name, keys in lists.items():
        lines(folder / f"{name}_key_list.txt", keys)
    clean = [key for name in ("clean_train", "clean_val", "clean_test") for key in lists[name] if key != UNLABELLED]
    lines(folder / "clean_label_kv.txt", [f"{key} {row % 14}" for row, key in enumerate(clean)])
    both = [f"{key} {(row + (row % 4 == 0)) % 14}" for row, key in enumerate(clean) if row % 2 == 0]
    noisy = [f"{key} {row % 14}" for row, key in enumerate(lists["noisy_train"])]
    lines(folder / "noisy_label_kv.txt", [*noisy, *both])
    lines(folder / "category_names_eng.txt", CLOTHES)
    for number, key in enumerate([*lists["noisy_train"], *clean]):
        jpeg(root / images / key.removeprefix("images/"), number)
    return root


def webvision(
    root: Path,
    synsets: Sequence[str] = SYNSETS,
    val: str = "val_images_256",
    trees: Mapping[str, str] | None = None,
    per_class: int = 3,
) -> Path:
    """WebVision with some images of each class from Google, from Flickr and for validation, in classes' order."""
    number = 0
    for part in ("google", "flickr"):
        rows = []
        for label in range(len(synsets)):
            for image in range(per_class):
                path = f"{part}/q{label + 1:04d}/{part[0]}{image}.jpg"
                jpeg(root / (trees or {}).get(part, ".") / path, number := number + 1)
                rows.append(f"{path} {label}")
        lines(root / f"info/train_filelist_{part}.txt", rows)
    rows = [f"val{row:06d}.jpg {row % len(synsets)}" for row in range(1, 2 * len(synsets) + 1)]
    for row in rows:
        jpeg(root / val / row.split()[0], number := number + 1)
    lines(root / "info/val_filelist.txt", rows)
    lines(root / "info/synsets.txt", synsets)
    return root


def animal_batch(file: Path, labels: Sequence[int], seed: int) -> np.ndarray:
    """A binary file of Animal-10N, and its pixels (N, 64, 64, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 64, 64, 3), np.uint8)
    with file.open("wb") as out:
        for number, (label, image) in enumerate(zip(labels, pixels, strict=True)):
            out.write(number.to_bytes(4, "big") + label.to_bytes(4, "big") + image.transpose(2, 0, 1).tobytes())
    return pixels
