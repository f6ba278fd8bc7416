"""The compiled part of a search by pairs: scores against the lists of the best so far. Imports numba: import it late.

A list is a row of `scores` and `ids`: a heap, the least score first, -inf and id -1 where nothing is yet. `least` is
what a score has to exceed to enter it: the least score, or a bound from elsewhere where that is higher.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numba import njit

F = TypeVar("F", bound=Callable[..., None])

_CHUNK = 64  # scores that are compared at once; only where one of them enters a list each is looked at
_LISTS = "float32[:, ::1], int32[:, ::1], float32[::1]"


def _compiled(arguments: str) -> Callable[[F], F]:
    """Compile for these types; kept on the disk where the file's or the user's cache directory can be written."""

    def decorate(function: F) -> F:
        signature = f"void({arguments})"
        try:
            compiled: F = njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):
            compiled = njit(signature, nogil=True)(function)
        return compiled

    return decorate


@_compiled(f"{_LISTS}, int64, float32, int64")
def _push(scores: np.ndarray, ids: np.ndarray, least: np.ndarray, row: int, score: float, name: int) -> None:
    """Put a score and its id in the place of a list's least one."""
    place, size = 0, scores.shape[1]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and scores[row, child + 1] < scores[row, child]:
            child += 1
        if scores[row, child] >= score:
            break
        scores[row, place], ids[row, place] = scores[row, child], ids[row, child]
        place = child
    scores[row, place], ids[row, place] = score, name
    least[row] = max(least[row], scores[row, 0])


@_compiled(f"float32[::1], int64, int64, int64, int64, int64, {_LISTS}, {_LISTS}")
def _enter(
    line: np.ndarray,
    row: int,
    start: int,
    stop: int,
    first_row: int,
    first_column: int,
    row_scores: np.ndarray,
    row_ids: np.ndarray,
    row_least: np.ndarray,
    column_scores: np.ndarray,
    column_ids: np.ndarray,
    column_least: np.ndarray,
) -> None:
    """Look at each of a row's scores from `start` to `stop`."""
    for column in range(start, stop):
        score = line[column]
        if score > row_least[row] and first_row + row != first_column + column:
            _push(row_scores, row_ids, row_least, row, score, first_column + column)
        if score > column_least[column]:
            _push(column_scores, column_ids, column_least, column, score, first_row + row)


@_compiled(f"float32[:, ::1], int64, int64, {_LISTS}, {_LISTS}")
def scan(
    block: np.ndarray,
    first_row: int,
    first_column: int,
    row_scores: np.ndarray,
    row_ids: np.ndarray,
    row_least: np.ndarray,
    column_scores: np.ndarray,
    column_ids: np.ndarray,
    column_least: np.ndarray,
) -> None:
    """Enter a block of scores (b, c) into the lists of its rows and into those of its columns.

    The ids of rows and columns count from `first_row` and `first_column`; nothing enters its own list.
    """
    rows, columns = (row_scores, row_ids, row_least), (column_scores, column_ids, column_least)
    whole = block.shape[1] // _CHUNK * _CHUNK
    for row in range(block.shape[0]):
        line = block[row]
        for start in range(0, whole, _CHUNK):
            bound, entering = row_least[row], np.int32(0)
            for column in range(_CHUNK):  # without a branch, so that it is compiled to vectors
                entering |= np.int32(line[start + column] > min(bound, column_least[start + column]))
            if entering:
                _enter(line, row, start, start + _CHUNK, first_row, first_column, *rows, *columns)
        _enter(line, row, whole, block.shape[1], first_row, first_column, *rows, *columns)


@_compiled(f"int64[::1], float32[:, ::1], int32[:, ::1], {_LISTS}")
def merge(
    places: np.ndarray,
    found_scores: np.ndarray,
    found_ids: np.ndarray,
    scores: np.ndarray,
    ids: np.ndarray,
    least: np.ndarray,
) -> None:
    """Enter each list (b, L) that was found into the list at its place (b,); several may go to one."""
    for row in range(len(places)):
        for column in range(found_ids.shape[1]):
            if found_ids[row, column] >= 0 and found_scores[row, column] > least[places[row]]:
                _push(scores, ids, least, places[row], found_scores[row, column], found_ids[row, column])
