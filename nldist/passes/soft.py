"""Soft labels: a row of class probabilities for every sample, with its owner."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nldist.dist.table import Column, blocks
from nldist.passes.base import Metrics
from nldist.passes.context import Context
from nldist.passes.method import Verdicts


def soft_rows(context: Context, name: str) -> Column:
    """A column (owned, C) on the device in `method.soft_dtype`, that begins as zeros.

    Every epoch sees each sample once, on its owner, and a checkpoint holds the rows: an update within a step happens
    exactly once, also in a run that is killed and resumed.
    """
    return context.table.add(name, soft_dtype(context), (context.train.num_classes,), on="device")


def soft_dtype(context: Context) -> torch.dtype:
    """What rows of class probabilities of every sample are kept in."""
    return {"float32": torch.float32, "float16": torch.float16}[context.config.method.soft_dtype]


def soft_labels(context: Context, name: str, height: float = 1) -> Column:
    """A column of `soft_rows` that begins as the given labels: `height` at them, 0 elsewhere."""
    column = soft_rows(context, name)
    labels = torch.from_numpy(context.labels[column.owned.start : column.owned.stop]).long()
    # Not scatter_, which makes a copy of all rows of float16.
    column.rows[torch.arange(len(labels)), labels] = height
    return column


def update(column: Column, ids: Tensor, logits: Tensor, momentum: float) -> Tensor:
    """Moving average of predictions: s <- m s + (1 - m) softmax(logits), without a gradient.

    Args:
        column: soft labels.
        ids: (b,) whose; owned.
        logits: (b, C).
        momentum: m.

    Returns:
        Their new rows (b, C), in the logits' precision.
    """
    logits = logits.detach()
    rows = momentum * column[ids].to(logits) + (1 - momentum) * logits.softmax(1)
    column[ids] = rows
    return rows


def given_share(context: Context, column: Column) -> np.ndarray:
    """What each owned sample's soft label leaves to its given label, float32 (owned,)."""
    labels = torch.from_numpy(context.labels[column.owned.start : column.owned.stop]).long()
    shares: np.ndarray = column.rows.gather(1, labels[:, None].to(column.rows.device))[:, 0].float().cpu().numpy()
    return shares


def corrected(column: Column) -> np.ndarray:
    """The class that each owned sample's soft label is largest for, (owned,)."""
    classes: np.ndarray = column.rows.argmax(1).cpu().numpy()
    return classes


def accuracy(context: Context, column: Column, population: np.ndarray | None = None) -> Metrics:
    """How many per cent of the soft labels are largest for the true class, where that is known. A collective."""
    if context.clean is None:
        return {}
    owned = column.owned
    ids = np.arange(owned.start, owned.stop)
    right = (corrected(column) == context.clean[ids])[slice(None) if population is None else np.isin(ids, population)]
    counts = context.world.all_reduce(torch.tensor([int(right.sum()), len(right)]))
    return {"soft_accuracy": 100 * float(counts[0] / counts[1])}


def soft_verdicts(
    context: Context, rows: Tensor, seen: Tensor | None = None, read: Callable[[Tensor], Tensor] = torch.Tensor.float
) -> Verdicts:
    """What rows of class probabilities say of the labels.

    Args:
        context: of the run.
        rows: (owned, C), of any sum; a row of zeros says nothing.
        seen: bool (owned,), which of them say something; None = all others.
        read: makes probabilities of rows (b, C), of some at a time: a copy of all may not fit.
    """
    owned = context.table.owned
    labels = torch.from_numpy(context.labels[owned.start : owned.stop]).long().to(rows.device)
    # Made at once: among the blocks they would keep glibc from using freed memory again.
    types = torch.float32, torch.bool, torch.int16
    clean, told, suggested = (torch.empty(len(rows), dtype=dtype, device=rows.device) for dtype in types)
    start = 0
    for block in blocks(rows):
        part = slice(start, start := start + len(block))
        probabilities = read(block)
        total = probabilities.sum(1)
        clean[part] = probabilities.gather(1, labels[part, None])[:, 0] / total
        suggested[part] = probabilities.argmax(1)
        told[part] = total > 0
    told = told if seen is None else seen & told
    clean[~told], suggested[~told] = torch.nan, -1
    return Verdicts(clean.cpu().numpy(), suggested.cpu().numpy())
