"""The passes of stage mine that make the graph of nearest neighbours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nldist.data.plan import Part, Plan
from nldist.dist.table import Column, SampleTable
from nldist.estimate.graph import GraphFile, neighbours_of, open_graph, purity
from nldist.estimate.neighbours import ShardedIndex
from nldist.estimate.pairs import PairSearch, num_candidates, num_steps
from nldist.passes.base import Batches, Curves, Metrics, Pass
from nldist.passes.context import Context

GRAPH_FILE = "neighbours.npy"


class _GraphPass(Pass):
    """The k nearest neighbours of every image into the graph's file.

    Args:
        context: of the run.
        vectors: gives the features of this rank's images (owned, d), of length 1.
    """

    name = "search"
    trains = False

    def __init__(self, context: Context, vectors: Callable[[], np.ndarray]) -> None:
        self._context, self._settings, self._vectors = context, context.config.mine, vectors
        self.num_samples = len(context.train)
        self._purity: dict[str, np.ndarray] = {}

    def start(self, num_steps: int, start_step: int) -> None:
        """Index the features of all ranks."""
        context, settings = self._context, self._settings
        self._index = ShardedIndex.build(
            self._vectors(),
            context.world,
            factory=settings.factory,
            num_probe=settings.num_probe,
            seed=context.seed("index"),
        )
        path = context.directory / GRAPH_FILE
        self._file = GraphFile(path, self.num_samples, settings.k, context.world)

    def sync(self) -> None:
        """What has been written is then in the file, also after a crash of the node."""
        self._file.flush()

    def finish(self) -> Metrics:
        """Name the file, and measure how often neighbours have the same label: the given one, and the true one."""
        context = self._context
        self._file.finish()
        owned = context.table.owned
        rows = open_graph(context.directory / GRAPH_FILE)[owned.start : owned.stop]
        for name, labels in (("given labels", context.labels), ("true labels", context.clean)):
            if labels is not None:
                shares = purity(rows, owned, labels, context.world)
                self._purity[name] = 100 * shares.cumsum() / np.arange(1, len(shares) + 1)
        names = {"given labels": "purity", "true labels": "purity_clean"}
        return {names[name]: float(shares[-1]) for name, shares in self._purity.items()}

    def curves(self) -> dict[str, Curves]:
        """See Pass."""
        ks = [float(k) for k in range(1, self._settings.k + 1)]
        lines = {name: (ks, shares.tolist()) for name, shares in self._purity.items()}
        title = f"{self._context.train.name}: neighbours with the same label"
        return {"purity": Curves(title, "nearest neighbours k", "share with the anchor's label (%)", lines)}


class SearchPass(_GraphPass):
    """Searched for block by block: some images of every rank a step. For any index, on any device."""

    def __init__(self, context: Context, vectors: Callable[[], np.ndarray]) -> None:
        super().__init__(context, vectors)
        self.batch = {"queries": self._settings.block}

    def plan(self) -> Plan:
        """See Pass."""
        most = -(-self.num_samples // self._context.world.size)
        return _Steps(-(-most // self._settings.block))

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        ids = self._context.table.owned[step * self._settings.block : (step + 1) * self._settings.block]
        self._file.write(ids.start, neighbours_of(self._index, ids, self._settings.k))
        return {}


class PairsPass(_GraphPass):
    """Each pair of images compared once (nldist.estimate.pairs): exact search on the CPU.

    Its lists are in the table: what is left of it can be done by any number of ranks.
    """

    any_world = True

    def __init__(self, context: Context, vectors: Callable[[], np.ndarray], scores: Column, ids: Column) -> None:
        super().__init__(context, vectors)
        self.batch, self._lists = {}, (scores, ids)

    def plan(self) -> Plan:
        """See Pass."""
        return _Steps(num_steps(self.num_samples))

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        super().start(num_steps, start_step)
        self._search = PairSearch(self._index, self._settings.k, *(column.numpy() for column in self._lists))

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        for ids, neighbours in self._search.step(step):
            self._file.write(ids.start, neighbours)
        return {}


def add_lists(table: SampleTable, k: int) -> tuple[Column, Column]:
    """The columns of a PairsPass's lists: scores and ids."""
    shape = (num_candidates(k),)
    scores = table.add("candidate_scores", torch.float32, shape, fill=-np.inf)
    return scores, table.add("candidates", torch.int32, shape, fill=-1)


@dataclass(frozen=True)
class _Steps:
    """Steps that read no image."""

    num_steps: int

    def step(self, k: int) -> dict[str, Part]:
        return {}
