"""Stage mine: features of every image in one sweep, then the graph of nearest neighbours (ScanMix, section 3.2)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nldist.config import Config, Recipe
from nldist.data.plan import Part, Plan
from nldist.data.views import ViewOp
from nldist.dist.checkpoint import load_file
from nldist.dist.engine import Engine
from nldist.errors import UserError
from nldist.estimate.graph import GraphFile, neighbours_of, normalise, open_graph, purity
from nldist.estimate.neighbours import ShardedIndex, check_factory
from nldist.models import Network
from nldist.passes.base import Batches, Curves, Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.method import Method, Phase, Stage
from nldist.passes.sweep import FeatureSweep
from nldist.pretext.base import with_projector

GRAPH_FILE = "neighbours.npy"
_WIDEST = 2048  # features of common backbones, at most


def _view(config: Config) -> str | list[ViewOp]:
    return config.views.eval if config.mine.view is None else config.mine.view


def _recipe(config: Config) -> Recipe:
    return replace(config.recipe, eval_view=config.view(_view(config)))


def _views(config: Config) -> dict[str, Any]:
    own = {} if config.mine.view is None else {"mine.view": _view(config)}
    return {"views.eval": _view(config)} | own


class Mine(Method):
    """The pre-trained network looks at every image once; each image's features stay with its owner."""

    score = "purity"
    uses_labels = False

    def __init__(self, context: Context) -> None:
        self.settings = context.config.mine
        super().__init__(context)
        assert context.config.pretext is not None
        projected = self.settings.layer == "projector"
        dim = context.config.pretext.dim if projected else self.engines[0].model.num_features
        self.column = context.table.add("features", torch.float32, (dim,))
        self._normalised = False  # whether the features have length 1

    def build_engines(self) -> list[Engine]:
        """See Method."""
        return [self.context.engine(0, self._with_projector)]

    def _with_projector(self, network: Network) -> Network:
        assert self.context.config.pretext is not None
        return with_projector(network, self.context.config.pretext.dim)

    def start(self) -> None:
        """Take over the pretext's network."""
        state = load_file(self.context.products["pretext"] / "weights" / "last.pt")["networks"][0]
        self.engines[0].model.load_state_dict(state)

    def phases(self) -> list[Phase]:
        """See Method."""
        return [
            Phase("features", 1, lambda epoch: [FeatureSweep(self.context, self.features, self.column)]),
            Phase("search", 1, lambda epoch: [SearchPass(self.context, self.vectors)]),
        ]

    def evaluation(self, epoch: int) -> list[Pass]:
        """None: the purity of the graph is measured when it is done."""
        return []

    def weights(self) -> list[dict[str, Tensor]]:
        """None: what this stage leaves is the graph."""
        return []

    def features(self, images: Tensor) -> Tensor:
        """Features (b, d) of the configured layer, in eval mode, no gradient."""
        layer = "project" if self.settings.layer == "projector" else "features"
        return self.engines[0].infer(images, layer)[0]

    def vectors(self) -> np.ndarray:
        """The features (owned, d) of length 1, in the table itself: a copy would be as large."""
        features = self.column.numpy()
        if not self._normalised:
            normalise(features, out=features)
            self._normalised = True
        return features

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        return super().state_dict() | {"normalised": self._normalised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        super().load_state_dict(state)
        self._normalised = state.get("normalised", False)  # nldist 0.1 kept them as they are


class SearchPass(Pass):
    """The k nearest neighbours of a block of images per step and rank, into the graph's file.

    Args:
        context: of the run.
        vectors: gives the features of this rank's images (owned, d), of length 1.
    """

    name = "search"
    trains = False

    def __init__(self, context: Context, vectors: Callable[[], np.ndarray]) -> None:
        self._context, self._settings, self._vectors = context, context.config.mine, vectors
        self.batch = {"queries": self._settings.block}
        self.num_samples = len(context.train)
        self._purity: dict[str, np.ndarray] = {}

    def plan(self) -> Plan:
        """Steps without images."""
        most = -(-self.num_samples // self._context.world.size)
        return _Blocks(-(-most // self._settings.block))

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

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        ids = self._context.table.owned[step * self._settings.block : (step + 1) * self._settings.block]
        self._file.write(ids.start, neighbours_of(self._index, ids, self._settings.k))
        return {}

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


@dataclass(frozen=True)
class _Blocks:
    """Steps that read no image."""

    num_steps: int

    def step(self, k: int) -> dict[str, Part]:
        return {}


def _check(config: Config, data: Data, _: int) -> None:
    mine, num_samples = config.mine, len(data.train)
    if mine.k >= num_samples:
        raise UserError(f"mine.k={mine.k} neighbours, but an image has {num_samples - 1} others; set less")
    check_factory(_dim(config), mine.factory, mine.num_probe, num_samples)


def _dim(config: Config) -> int:
    assert config.pretext is not None
    return config.pretext.dim if config.mine.layer == "projector" else _WIDEST


def _num_bytes(config: Config, data: Data) -> int:
    """The graph, and a checkpoint of the features."""
    return 4 * len(data.train) * (config.mine.k + _dim(config))


MINE = Stage(
    *("mine", _recipe, Mine), needs=("pretext",), settings=("mine.",), views=_views, check=_check, num_bytes=_num_bytes
)
