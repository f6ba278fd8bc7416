"""How far a stage is, and what it has found on the way: saved, and resumed."""

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from nldist import __version__
from nldist.data.manifest import sharded_resize
from nldist.dist.checkpoint import Checkpoints, Position
from nldist.errors import UserError
from nldist.models import model_revision
from nldist.passes.method import Method
from nldist.run.classifier import Classifier
from nldist.run.directory import RunDirectory
from nldist.run.summary import measured
from nldist.train.meter import Meter


class Progress:
    """The state of a stage's training on this rank.

    Args:
        method: what is trained.
        checkpoints: of the stage.
        run: its directory.
        stage: its name.

    Attributes:
        position: everything before it is done.
        record: what the checkpoint keeps of the history.
        meter: of the present pass.
        resumed: what it goes on from: checkpoint, number of ranks and version of nldist that wrote it; None: nothing.
    """

    def __init__(self, method: Method, checkpoints: Checkpoints, run: RunDirectory, stage: str) -> None:
        self._method, self._checkpoints, self._run, self._stage = method, checkpoints, run, stage
        self._context = method.context
        self.position, self.meter = Position(), Meter()
        self.record: dict[str, Any] = {
            "step": 0,
            "seconds": 0.0,
            "train_images": 0,
            "train_seconds": 0.0,
            "num_bad": 0,
            "scores": [],  # the method's score, by epoch; NaN where it was not measured
            "epoch": {},  # metrics of the present epoch's finished passes
            "quality": {},  # of the latest division
            "measured": {},  # further accuracies by name, of the epochs that have them
            "test_split": None,  # on which those called test_* were measured
            "chosen": {},  # what weights/best.pt comes to on the test split
        }
        self.num_bad_before = 0  # in the present pass before it was resumed
        self.resumed = self._resume()
        self._began = time.perf_counter() - self.record["seconds"]

    def _resume(self) -> tuple[str, int, str] | None:
        path = self._checkpoints.latest()
        if path is None:
            self._method.start()
            return None
        self.position, shared, rank = self._checkpoints.load(path, self._context.table)
        self._method.load_state_dict(shared["method"])
        self.record |= shared["record"]
        if rank is not None:
            self._method.load_rank_state_dict(rank["method"])
            self.meter, self.num_bad_before = Meter(rank["meter"]), rank["num_bad"]
        return path.name, shared["world_size"], shared.get("nldist", "0.1.0")

    def save(self, position: Position, num_bad: int = 0, *, any_world: bool = False) -> None:
        """Write a checkpoint at `position`, `num_bad` records of whose pass were bad on this rank. A collective.

        `any_world`: another number of ranks can go on within that pass.

        Raises:
            UserError: the training has diverged, or the file system refused.
        """
        self.check_finite()
        self.position = position
        self.record["seconds"] = time.perf_counter() - self._began
        shared = {
            "method": self._method.state_dict(),
            "record": self.record,
            "model_revision": model_revision(self._context.config.model.name),
            "nldist": __version__,
            "any_world": any_world,
        }
        rank = {
            "method": self._method.rank_state_dict(),
            "meter": self.meter.state_dict(),
            "num_bad": num_bad if position.step else 0,
        }
        self._checkpoints.save(position, shared, rank, self._context.table)

    def check_finite(self) -> None:
        """Before anything is saved: a run must not go on from what has diverged (UserError)."""
        for name, value in self.meter.means().items():
            if not math.isfinite(value):
                # A stage with other settings is in another directory anyhow.
                optim, where = f"{self._stage}.optim", ""
                if self._stage == "train":
                    optim, where = "optim", ", in another run.dir"
                raise UserError(f"{name} has become {value}: lower {optim}.lr or set {optim}.clip_norm{where}")

    def save_weights(self, num_epochs: int, metrics: Mapping[str, Any]) -> None:
        """Keep the weights after an epoch with these metrics as the last ones, and the better ones as the best."""
        if not self._context.world.is_main:
            return
        weights, name, train = self._method.weights(), self._context.config.model.name, self._context.train
        facts = {
            "stage": self._stage,
            "model": name,
            "model_revision": model_revision(name),
            "classes": train.classes,
            "resize": sharded_resize(train.root, train.split),  # for images that are not sharded
            "epoch": num_epochs,
            self._method.score: metrics.get(self._method.score, math.nan),
        }
        self._run.save_weights("last", weights, facts)
        better = self._better(metrics, len(weights))
        if any(better):
            if self._chooses_each(len(weights)):
                weights, facts["epoch"] = self._merged(weights, num_epochs, better)
                del facts[self._method.score]  # it was measured of other pairs
            self._run.save_weights("best", weights, facts)

    def measure(self, metrics: Mapping[str, Any]) -> None:
        """Keep an epoch's further accuracies."""
        record, split = self.record, self._context.config.data.test_split
        if record["test_split"] != split:
            kept = {name: values for name, values in record["measured"].items() if not name.startswith("test_")}
            record["measured"], record["test_split"] = kept, split
        for name, value in measured(metrics).items():
            record["measured"].setdefault(name, []).append(value)

    def _chooses_each(self, num_networks: int) -> bool:
        return self._context.config.train.best == "each" and num_networks > 1

    def _better(self, metrics: Mapping[str, Any], num_networks: int) -> list[bool]:
        """Of each network: whether weights/best.pt is to have it as it is now."""
        each = self._chooses_each(num_networks)
        names = [f"accuracy{number}" if each else self._method.score for number in range(num_networks)]
        before = self.record["measured"] | {self._method.score: self.record["scores"]}
        return [name in metrics and metrics[name] >= np.nanmax(before[name]) for name in names]

    def _merged(
        self, weights: list[dict[str, Tensor]], num_epochs: int, better: list[bool]
    ) -> tuple[list[dict[str, Tensor]], list[int]]:
        """The networks that are better now, and the others from weights/best.pt; the epoch of each."""
        if all(better):
            return weights, [num_epochs] * len(weights)
        saved = self._run.load_weights("best")
        pairs = zip(better, weights, saved["networks"], strict=True)
        epochs = [num_epochs if now else epoch for now, epoch in zip(better, saved["epoch"], strict=True)]
        return [new if now else old for now, new, old in pairs], epochs

    def best(self) -> Classifier:
        """The networks of weights/best.pt."""
        return Classifier(self._run.load_weights("best"), self._context.config, self._context.world.device)
