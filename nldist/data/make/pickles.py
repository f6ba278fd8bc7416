"""Pickles that hold containers and numpy arrays, as published data sets do: read as data, never run as code."""

import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np


def load_data(file: IO[bytes]) -> Any:
    """What the pickle at the file's position holds. Text and bytes of Python 2 become text (Latin-1).

    Raises:
        Exception: almost any, for a damaged pickle; pickle.UnpicklingError for one that asks for anything else.
    """
    return _DataUnpickler(file, encoding="latin1").load()


class _DataUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module.replace("numpy._core.", "numpy.core."), name))
        if found is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of labels or pixels needs")
        return found


def _encode_latin1(text: str, encoding: str) -> bytes:
    # Protocol 2 of Python 3 writes bytes as a call of _codecs.encode with this encoding, and no other.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _scalar(dtype: np.dtype, data: bytes | str) -> Any:
    """A number. Bytes come as text where the pickle is of Python 2."""
    if dtype.hasobject:
        raise pickle.UnpicklingError(f"a scalar of type {dtype}")
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)[0]


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # type: ignore[dict-item]
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode_latin1,
}
