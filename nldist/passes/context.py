"""What a method is given: settings, world, data, per-sample state; streams, plans and views of them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nldist.config import Config
from nldist.data.cache import ShardCache
from nldist.data.index import Index
from nldist.data.plan import Plan, shuffled, sweep
from nldist.data.stream import Batch, Stream
from nldist.data.views import View
from nldist.dist.build_engine import build_engine
from nldist.dist.engine import Engine
from nldist.dist.optimizer import batch_factor, learning_rate
from nldist.dist.table import SampleTable
from nldist.dist.world import World
from nldist.models import Network, build_model


@dataclass
class Context:
    """What every method is given: the run's settings, this rank's world, the data and the per-sample state."""

    config: Config
    world: World
    train: Index
    evaluation: Index
    labels: np.ndarray  # (N,) the labels to train with
    clean: np.ndarray | None  # (N,) true labels where known; only to measure
    table: SampleTable
    directory: Path = Path("tables")  # where the run keeps its large products
    products: Mapping[str, Path] = field(default_factory=dict)  # run directories of the stages before this one

    def __post_init__(self) -> None:
        data, views = self.config.data, self.config.views
        self.train_view = View(views.train, data.mean, data.std)
        self.strong_view = View(views.strong, data.mean, data.std) if views.strong else None
        self.eval_view = View(views.eval, data.mean, data.std)
        self._cache = ShardCache(data.cache_dir, int(data.cache_gib * 2**30)) if data.cache_dir else None

    @property
    def global_batch(self) -> int:
        """Samples per optimiser step of one network, over all ranks."""
        return self.config.train.batch_size * self.world.size * self.config.optim.accumulate

    def learning_rate(self, epoch: float) -> float:
        """The scheduled learning rate at a (fractional) epoch, for the global batch."""
        optim = self.config.optim
        return learning_rate(optim, epoch, max(self.config.train.epochs, 1), batch_factor(optim, self.global_batch))

    def fingerprint(self, *, labels: bool = True) -> str:
        """Names the training samples, their order and their labels: what per-sample state belongs to."""
        index = self.train
        digest = hashlib.sha256(json.dumps([index.name, index.classes, len(index)]).encode())
        for column in (index.crc32, index.label, self.labels) if labels else (index.crc32,):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()

    def stream(self, split: str, plan: Plan, start_step: int = 0) -> Stream:
        """The batches of a plan over the split "train" (with the labels to train with) or "evaluation"."""
        data, train = self.config.data, split == "train"
        return Stream(
            self.train if train else self.evaluation,
            self.labels if train else None,
            plan,
            num_workers=data.num_workers,
            device=self.world.device,
            start_step=start_step,
            on_bad=data.on_bad,
            max_side=data.max_side,
            cache=self._cache,
        )

    def engine(
        self, number: int, shape: Callable[[Network], Network] = lambda network: network, *, partly: bool = False
    ) -> Engine:
        """Network `number`, initialised from (seed, number) alone: a classifier, or what `shape` makes of one.

        `partly` is the Engine's.
        """
        model = self.config.model
        torch.manual_seed(self.config.run.seed * 1009 + number)
        network = build_model(model.name, self.train.num_classes, pretrained=model.pretrained)
        return build_engine(shape(network), self.config, self.world, partly=partly)

    def shuffled(self, epoch: int, purpose: int, batch_size: int) -> Plan:
        """A shuffled plan over all training samples; `purpose` tells the plans of one epoch apart."""
        return shuffled(
            len(self.train),
            rank=self.world.rank,
            size=self.world.size,
            batch_size=batch_size,
            seed=self.config.run.seed + 1_000_003 * purpose,
            epoch=epoch,
            window=self.config.data.window,
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

    def view(self, batch: Batch, epoch: int, purpose: int, view: View | None = None) -> Tensor:
        """A random view (by default views.train) of a batch, (b, 3, h, w); drawn by (seed, epoch, purpose, sample)."""
        key = (self.config.run.seed, epoch, purpose)
        return (view or self.train_view)(batch.images, batch.sizes, batch.draws, key)

    def fixed_view(self, batch: Batch) -> Tensor:
        """The evaluation view of a batch, (b, 3, h, w)."""
        return self.eval_view(batch.images, batch.sizes, batch.draws, (0, 0, 0))

    def generator(self, *key: int) -> np.random.Generator:
        """Randomness for one rank's step, a pure function of the run's seed, `key` and the rank."""
        return np.random.default_rng([self.config.run.seed, *key, self.world.rank])
