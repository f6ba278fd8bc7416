"""Stage mine: features of every image in one sweep, then the graph of nearest neighbours (ScanMix, section 3.2)."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nldist.config import Config, Recipe
from nldist.data.views import ViewOp
from nldist.dist.checkpoint import load_file
from nldist.dist.engine import Engine
from nldist.errors import UserError
from nldist.estimate.graph import normalise
from nldist.estimate.neighbours import check_factory, searches_pairs
from nldist.estimate.pairs import num_candidates
from nldist.models import Network
from nldist.passes.base import Pass
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.method import Method, Phase, Stage
from nldist.passes.sweep import FeatureSweep
from nldist.pretext.base import with_projector
from nldist.pretext.graph_passes import GRAPH_FILE, PairsPass, SearchPass, add_lists

__all__ = ["GRAPH_FILE", "MINE", "Mine"]
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
        # How the search is done, or was begun on a machine that may have had GPUs where this one has none.
        self._by_pairs = searches_pairs(self.settings.factory, context.world)
        self._lists = add_lists(context.table, self.settings.k) if self.settings.factory == "Flat" else None

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
            Phase("search", 1, lambda epoch: [self._search()]),
        ]

    def _search(self) -> Pass:
        if self._lists is not None and self._by_pairs:
            return PairsPass(self.context, self.vectors, *self._lists)
        return SearchPass(self.context, self.vectors)

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
        return super().state_dict() | {"normalised": self._normalised, "by_pairs": self._by_pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        super().load_state_dict(state)
        self._normalised = state.get("normalised", False)  # nldist 0.1 kept them as they are
        self._by_pairs = state.get("by_pairs", False)


def _check(config: Config, data: Data, _: int) -> None:
    mine, num_samples = config.mine, len(data.train)
    if mine.k >= num_samples:
        raise UserError(f"mine.k={mine.k} neighbours, but an image has {num_samples - 1} others; set less")
    check_factory(_dim(config), mine.factory, mine.num_probe, num_samples)


def _dim(config: Config) -> int:
    assert config.pretext is not None
    return config.pretext.dim if config.mine.layer == "projector" else _WIDEST


def _num_bytes(config: Config, data: Data) -> int:
    """The graph, and a checkpoint of the features and of the lists of an exact search."""
    lists = 2 * num_candidates(config.mine.k) if config.mine.factory == "Flat" else 0
    return 4 * len(data.train) * (config.mine.k + _dim(config) + lists)


MINE = Stage(
    *("mine", _recipe, Mine), needs=("pretext",), settings=("mine.",), views=_views, check=_check, num_bytes=_num_bytes
)
