"""The nearest neighbours of every sample in the whole data set, by the present network's features."""

import numpy as np
import torch
from torch import Tensor

from nldist.data.stream import Batch
from nldist.dist.table import Column
from nldist.estimate.graph import every_neighbour, normalise
from nldist.estimate.neighbours import ShardedIndex
from nldist.passes.base import Metrics
from nldist.passes.context import Context
from nldist.passes.sweep import Output, Sweep


class SearchSweep(Sweep):
    """Features of every sample, which stay with their owners; then each one's nearest others by their cosine, exactly.

    Args:
        context: of the run.
        features: (b, d) of images.
        column: int32 (owned, k), gets the ids of the k nearest others, nearest first. The same on any number of ranks.
        population: sorted ids of those that are looked at, and are neighbours; None = all.
    """

    def __init__(
        self, context: Context, features: Output, column: Column, population: np.ndarray | None = None
    ) -> None:
        super().__init__(context, "search", population)
        self._output, self._column = features, column
        self._features: Tensor | None = None

    def resume_step(self, num_done: int) -> int | None:
        """Features are in no checkpoint, which they would make many times larger: the sweep starts again."""
        return 0

    def see(self, batch: Batch, images: Tensor) -> None:
        """See Sweep."""
        features = self._output(images)
        if self._features is None:
            self._features = torch.zeros(len(self.context.table.owned), features.shape[1], dtype=torch.float32)
        self._features[batch.ids.cpu() - self.context.table.owned.start] = features.to(self._features)

    def finish(self) -> Metrics:
        """Index the features of all ranks and search. A collective."""
        context, owned = self.context, self.context.table.owned
        ids = np.arange(len(context.train)) if self._population is None else self._population
        places = range(*np.searchsorted(ids, [owned.start, owned.stop]).tolist())
        mine = ids[places.start : places.stop]
        # A rank that has seen no image has to know the width, too.
        own_width = torch.tensor(0 if self._features is None else self._features.shape[1])
        width = int(context.world.all_reduce(own_width, "max"))
        features = self._features
        if features is None:
            features = torch.zeros((len(owned), width), dtype=torch.float32)
        vectors = features[mine - owned.start].numpy()
        self._features = features = None
        index = ShardedIndex.build(normalise(vectors, out=vectors), context.world)
        found = every_neighbour(index, self._column.rows.shape[1])
        self._column[torch.from_numpy(mine)] = torch.from_numpy(ids[found])
        return {}
