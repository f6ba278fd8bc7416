"""What a method is given: settings, world, data, per-sample state; streams, plans and views of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nldist.config import Config, Recipe
from nldist.data.index import Index
from nldist.data.plan import Plan, balanced, shuffled, sweep
from nldist.data.stream import Batch, Stream
from nldist.data.views import View
from nldist.dist.build_engine import build_engine
from nldist.dist.engine import Engine
from nldist.dist.optimizer import batch_factor, learning_rate
from nldist.dist.table import SampleTable
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.models import Network, build_model
from nldist.passes.data import Data, NodeCaches
from nldist.randomness import seed_of


@dataclass
class Context:
    """What every method is given: settings, this rank's world, the data, and the per-sample state.

    Attributes:
        config: the whole run's settings.
        stage: of which stage of the run.
        recipe: how it trains.
        world: this rank's.
        data: the images and labels.
        directory: where this stage keeps its large products.
        products: the run directories of the stages before this one, by name.
        table: the per-sample state.
    """

    config: Config
    stage: str
    recipe: Recipe
    world: World
    data: Data
    directory: Path = Path("tables")
    products: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data = self.config.data
        self.table = SampleTable(len(self.train), self.world)
        self.train_view, self.eval_view = (
            View(ops, data.mean, data.std) for ops in (self.recipe.train_view, self.recipe.eval_view)
        )
        self._views: dict[str, View] = {}
        self._caches = NodeCaches(data)

    @property
    def train(self) -> Index:
        """The training images."""
        return self.data.train

    @property
    def evaluation(self) -> Index:
        """The images that accuracy is measured on."""
        return self.data.evaluation

    @property
    def labels(self) -> np.ndarray:
        """The labels to train with, (N,)."""
        return self.data.labels

    @property
    def clean(self) -> np.ndarray | None:
        """The true labels where they are known, (N,): only to measure."""
        return self.data.clean

    def named_view(self, name: str) -> View:
        """One of `views`."""
        if name not in self._views:
            self._views[name] = View(self.config.view(name), self.config.data.mean, self.config.data.std)
        return self._views[name]

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step of one network, over all ranks."""
        return self.recipe.batch_size * self.world.size * self.recipe.optim.accumulate

    def learning_rate(self, epoch: float) -> float:
        """The scheduled learning rate at a (fractional) epoch, for the global batch."""
        optim = self.recipe.optim
        return learning_rate(optim, epoch, max(self.recipe.epochs, 1), batch_factor(optim, self.global_batch))

    def stream(self, split: str, plan: Plan, start_step: int = 0) -> Stream:
        """The batches of a plan over the split "train" (with the labels to train with), "evaluation" or "test"."""
        data, index = self.config.data, self.data.index(split)
        return Stream(
            index,
            self.labels if split == "train" else None,
            plan,
            num_workers=data.num_workers,
            device=self.world.device,
            start_step=start_step,
            on_bad=data.on_bad,
            max_side=data.max_side,
            cache=self._caches.shards,
            decoded=self._caches.decoded(index),
        )

    def engine(
        self, number: int, shape: Callable[[Network], Network] = lambda network: network, *, partly: bool = False
    ) -> Engine:
        """Network `number`, initialised from (seed, number) alone: a classifier, or what `shape` makes of one.

        `partly` is the Engine's.
        """
        model = self.config.model
        torch.manual_seed(self.seed(f"net{number}", "weights"))
        network = build_model(model.name, self.train.num_classes, pretrained=model.pretrained)
        return build_engine(shape(network), self.config, self.world, self.recipe, partly=partly)

    def subset(self, num_samples: int | None) -> np.ndarray | None:
        """A class-balanced subset of about so many training samples, fixed for the run: sorted ids; None: all."""
        if num_samples is None:
            return None
        num_classes = self.train.num_classes
        if num_samples < (least := max(num_classes, 4 * self.world.size)):
            raise UserError(f"method.{self.config.method.name}.subset={num_samples} is too small: set {least} or more")
        return balanced(self.labels, num_samples, seed=self.seed("subset"), epoch=0, num_classes=num_classes)

    def shuffled(self, epoch: int, name: str, batch_size: int, population: np.ndarray | None = None) -> Plan:
        """A shuffled plan over all training samples (of `population`, sorted ids), each on its owner.

        `name` tells the plans of one epoch apart.
        """
        return shuffled(
            len(self.train),
            rank=self.world.rank,
            size=self.world.size,
            batch_size=batch_size,
            seed=self.seed(name, "plan"),
            epoch=epoch,
            window=self.config.data.window,
            population=population,
            aligned=True,
        )

    def sweep(self, num_samples: int, population: np.ndarray | None = None) -> Plan:
        """A plan that sees every sample (of `population`, sorted ids) once, each on its owner."""
        return sweep(
            num_samples,
            rank=self.world.rank,
            size=self.world.size,
            batch_size=self.config.train.eval_batch_size,
            population=population,
        )

    def view(self, batch: Batch, epoch: int, name: str, view: View | None = None) -> Tensor:
        """A random view (by default the recipe's) of a batch, (b, 3, h, w); drawn by (seed, name, epoch, sample)."""
        key = (self.seed(name, "view"), epoch)
        return (view or self.train_view)(batch.images, batch.sizes, batch.draws, key)

    def fixed_view(self, batch: Batch) -> Tensor:
        """The evaluation view of a batch, (b, 3, h, w)."""
        return self.eval_view(batch.images, batch.sizes, batch.draws, ())

    def seed(self, *name: str | int) -> int:
        """The seed of one of this stage's decisions (nldist.randomness)."""
        return seed_of(self.config.run.seed, self.stage, *name)

    def generator(self, *name: str | int) -> np.random.Generator:
        """The randomness of one of this stage's decisions, the same on every rank."""
        return np.random.default_rng(self.seed(*name))
