"""Soft labels: a row of class probabilities for every sample, with its owner."""

import torch

from nldist.dist.table import Column
from nldist.passes.context import Context


def soft_labels(context: Context, name: str) -> Column:
    """A column (owned, C) on the device in `method.soft_dtype`, that begins as the given labels, one-hot.

    Every epoch sees each sample once, on its owner, and a checkpoint holds the rows: an update within a step happens
    exactly once, also in a run that is killed and resumed.
    """
    dtype = {"float32": torch.float32, "float16": torch.float16}[context.config.method.soft_dtype]
    column = context.table.add(name, dtype, (context.train.num_classes,), on="device")
    labels = torch.from_numpy(context.labels[column.owned.start : column.owned.stop]).long()
    column.rows.scatter_(1, labels[:, None].to(column.rows.device), 1)
    return column
