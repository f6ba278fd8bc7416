"""An image file as training sees it: what this decodes is an image, and nothing else is."""

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_RGB = 3  # torchvision.io.ImageReadMode.RGB


class DecodeError(Exception):
    """A file that training cannot decode; the message says why."""


def decoded(data: bytearray | memoryview) -> Tensor:
    """An image file's pixels, uint8 (3, height, width).

    Raises:
        DecodeError: it is no image, of a kind that torchvision does not read, or has several frames.
    """
    try:
        image: Tensor = _decode(torch.frombuffer(data, dtype=torch.uint8), _RGB, True)
    except (RuntimeError, ValueError) as error:
        raise DecodeError(_one_line(error)) from error
    if image.ndim != 3:
        raise DecodeError("it has several frames")
    if image.dtype == torch.uint16:  # a PNG file of 16 bits
        return (image.int() // 257).to(torch.uint8)
    return image


def reduced(sizes: np.ndarray, max_side: int) -> np.ndarray:
    """Heights and widths, int64 (b, 2), after longer sides are reduced to `max_side`."""
    longest = sizes.max(axis=1, keepdims=True, initial=1)
    fewer = np.maximum(np.rint(sizes * (max_side / longest)), 1).astype(np.int64)
    return np.where(longest > max_side, fewer, sizes)


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


_decode = _decoder()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
