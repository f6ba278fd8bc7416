"""The same image with different labels: byte for byte, and nearly so among nearest neighbours."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from nldist.data.index import Index
from nldist.data.reader import Reader

_SIDE = 16  # pixels that near duplicates are compared on
_ALIKE = 6.0  # mean difference of grey levels, of 255, after both were made equally bright
_FLAT = 8.0  # images whose grey levels deviate less look alike whatever they show
_BLOCK = 256


@dataclass(frozen=True)
class Duplicates:
    """A group of images that are the same, or nearly, and have different labels. `ids`: the most doubtful first."""

    ids: list[int]
    exact: bool


def exact(index: Index, labels: np.ndarray, rank: np.ndarray) -> list[Duplicates]:
    """Groups of byte-identical images (their CRC-32, size and shape say so) with different labels.

    Args:
        index: of the images.
        labels: int (N,).
        rank: int (N,), 1 = most doubtful. Groups and their members are in its order.
    """
    records = index.records
    names = ("crc32", "size", "height", "width")
    order = np.lexsort([rank, *(records[name] for name in names)])
    same = np.ones(max(len(order) - 1, 0), bool)
    for name in names:
        column = records[name][order]
        same &= column[1:] == column[:-1]
    edges = np.flatnonzero(np.diff(same, prepend=False, append=False))
    groups = [order[start : stop + 1] for start, stop in edges.reshape(-1, 2)]
    found = [Duplicates(group.tolist(), exact=True) for group in groups if len(set(labels[group].tolist())) > 1]
    return sorted(found, key=lambda group: int(rank[group.ids[0]]))


def near(
    graph: np.ndarray, labels: np.ndarray, rank: np.ndarray, reader: Reader, num_pairs: int
) -> Iterator[Duplicates]:
    """Pairs of images that are each other's nearest neighbour, have different labels and look alike.

    Their pixels decide: both as 16 x 16 grey levels, of equal mean. Byte-identical images are left out. A bar tells of
    the progress.

    Args:
        graph: (N, k) ids of neighbours, nearest first.
        labels: int (N,).
        rank: int (N,), 1 = most doubtful. The most doubtful pairs are looked at; each begins with its doubtful one.
        reader: of the images.
        num_pairs: so many pairs are looked at, at most.
    """
    nearest = np.array(graph[:, 0])
    ids = np.arange(len(nearest))
    other = labels[nearest] != labels
    first = ids[(nearest[nearest] == ids) & other & (rank < rank[nearest])]
    crc = reader.index.records["crc32"]
    first = first[crc[first] != crc[nearest[first]]]
    first = np.sort(first[np.argsort(rank[first])][:num_pairs])  # as they lie in the shards
    for start in trange(0, len(first), _BLOCK, desc="pairs", unit=f" x {_BLOCK}", leave=False):
        block = first[start : start + _BLOCK]
        alike = _alike(_small(reader, block), _small(reader, nearest[block]))
        for place in np.flatnonzero(alike).tolist():
            yield Duplicates([int(block[place]), int(nearest[block[place]])], exact=False)


def _small(reader: Reader, ids: np.ndarray) -> Tensor:
    """Grey levels (b, 16, 16) less their mean; NaN for an image that cannot be read."""
    images = reader.read(ids)
    small = torch.full((len(ids), _SIDE, _SIDE), torch.nan)
    for place, pixels, (height, width) in zip(images.kept.tolist(), images.pixels, images.sizes.tolist(), strict=True):
        grey = pixels[:height, :width].float().mean(2)[None, None]
        small[place] = F.interpolate(grey, (_SIDE, _SIDE), mode="bilinear", antialias=True)[0, 0]
    return small - small.mean((1, 2), keepdim=True)


def _alike(one: Tensor, other: Tensor) -> np.ndarray:
    """Which pairs look alike, bool (b,)."""
    close = (one - other).abs().mean((1, 2)) < _ALIKE
    told = torch.minimum(one.std((1, 2)), other.std((1, 2))) > _FLAT
    return (close & told).numpy()
