"""The C library's memory, on CPUs."""

import ctypes
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks of any size for the next allocation, in this process and those forked from it.

    Otherwise every large tensor is new memory, whose pages are cleared first: more work than cropping a batch.
    """
    for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
        _call("mallopt", option, 1 << 30)


def return_freed_memory() -> None:
    """Give what has been freed back to the system: after work that other work does not resemble."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: Any) -> None:
    """A function of glibc's; other C libraries are left as they are."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), name):
        getattr(libc, name)(*arguments)
