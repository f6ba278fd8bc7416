"""Small raw image folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cow")


def write_folder(root: Path, counts: tuple[int, ...] = (9, 5, 7)) -> Path:
    """One directory per class of 6x8 PNG images (and JPEG for every third), all different."""
    generator = np.random.default_rng(0)
    for name, count in zip(CLASSES, counts, strict=True):
        (root / name).mkdir(parents=True)
        for number in range(count):
            image = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            image.save(root / name / f"{number:03d}.{'jpg' if number % 3 == 0 else 'png'}")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A raw folder of 21 images in 3 classes."""
    return write_folder(tmp_path / "raw")
