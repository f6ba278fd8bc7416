"""scikit-learn's digits: 1,797 grey images of 8x8 pixels in 10 classes, carried by scikit-learn itself."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from nldist.data.make.sources.base import Listing

SPLITS = ("train", "test")


@dataclass(frozen=True)
class DigitsSource:
    """`split` is "train" (80 %) or "test" (20 %): a fixed split, stratified by class."""

    kind: ClassVar[str] = "digits"
    split: str

    def listing(self) -> Listing:
        """List the split; a path is the image's number in scikit-learn's order."""
        from sklearn.model_selection import train_test_split

        _, labels = _digits()
        numbers = np.arange(len(labels))
        parts = train_test_split(numbers, test_size=0.2, stratify=labels, random_state=0)
        rows = np.sort(parts[SPLITS.index(self.split)])
        return Listing.of([b"%04d" % row for row in rows], labels[rows], [str(digit) for digit in range(10)])

    def read(self, path: bytes, max_bytes: int) -> np.ndarray:
        """One image, uint8 (8, 8)."""
        return np.asarray(_digits()[0][int(path)])


def sources() -> dict[str, DigitsSource]:
    """Both splits."""
    return {split: DigitsSource(split) for split in SPLITS}


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (1797, 8, 8), scaled from 0..16 to 0..255, and labels (1797,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
