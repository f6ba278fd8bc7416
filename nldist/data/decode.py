"""An image file as training sees it: what this decodes is an image, and nothing else is."""

import contextlib
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from nldist.data.make.jpegs import is_common

OFF_ALIGNMENT = 16
"""How far from a multiple of 32 bytes batches begin: libjpeg-turbo writes what is aligned past the processor's cache
(AVX2), and decoding images of 32 x 32 pixels takes up to twice as long (findings/libjpeg_aligned_output.sh)."""

_RGB = 3  # torchvision.io.ImageReadMode.RGB


class DecodeError(Exception):
    """A file that training cannot decode; the message says why."""


def decoded(data: bytes, into: np.ndarray | None = None) -> np.ndarray:
    """An image file's pixels, uint8 (height, width, 3), the same as torchvision's.

    Most JPEGs are decoded by simplejpeg, which has the same library within and takes a third of torchvision's time
    for 32 x 32 pixels; all else by torchvision, and what simplejpeg refuses, such as odd ways of subsampling.

    Args:
        data: the file.
        into: uint8 (height, width, 3), contiguous: where the pixels may be put. What is returned is this array if they
            are there in this shape. Else its contents are arbitrary, and what is returned may lie in it.

    Raises:
        DecodeError: it is no image, of a kind that torchvision does not read, or has several frames.
    """
    if is_common(data):
        try:
            pixels: np.ndarray = simplejpeg.decode_jpeg(data, buffer=into)
        except ValueError:
            return _by_torchvision(data)
        return into if into is not None and into.shape == pixels.shape else pixels
    return _by_torchvision(data)


def _by_torchvision(data: bytes) -> np.ndarray:
    try:
        image = _decoder()(torch.frombuffer(bytearray(data), dtype=torch.uint8), _RGB, True)
    except (RuntimeError, ValueError) as error:
        raise DecodeError(_one_line(error)) from error
    if image.ndim != 3:
        raise DecodeError("it has several frames")
    if image.dtype == torch.uint16:  # a PNG file of 16 bits
        image = (image.int() // 257).to(torch.uint8)
    pixels: np.ndarray = image.permute(1, 2, 0).numpy()
    return pixels


def reduced(sizes: np.ndarray, max_side: int) -> np.ndarray:
    """Heights and widths, int64 (b, 2), after longer sides are reduced to `max_side`."""
    longest = sizes.max(axis=1, keepdims=True, initial=1)
    fewer = np.maximum(np.rint(sizes * (max_side / longest)), 1).astype(np.int64)
    return np.where(longest > max_side, fewer, sizes)


@functools.cache
def _decoder() -> Any:
    """What torchvision.io.decode_image calls; that function spends 10 us per image on a warning.

    The library that holds it (image.so, in newer releases image_stable.so) is loaded alone: the package around it
    imports torch._dynamo and sympy, which takes seconds in each process. Should it not be found, the package is.
    """
    package = importlib.util.find_spec("torchvision")
    for folder in (package and package.submodule_search_locations) or ():
        for library in Path(folder).glob("image*.so"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    if not hasattr(torch.ops.image, "decode_image"):
        import torchvision.io  # noqa: F401
    return torch.ops.image.decode_image


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
