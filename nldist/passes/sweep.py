"""Sweeps: every sample once, by its owner, in its fixed view, without a gradient."""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.data.plan import Plan
from nldist.data.stream import Batch
from nldist.dist.table import Column
from nldist.errors import UserError
from nldist.estimate.division import divide, split_quality
from nldist.passes.base import Batches, Metrics, Pass, Split
from nldist.passes.context import Context
from nldist.passes.method import Verdicts

TAU = 0.5  # as likely right as wrong
_NUM_RANDOM_VIEWS = 4  # of an image, at the end of a run
Output = Callable[[Tensor], Tensor]  # of images (b, 3, h, w), in eval mode, without a gradient
Labels = Callable[[Tensor], Tensor]  # of owned ids (b,), int64 (b,)


def label_quality(context: Context, clean_probability: np.ndarray, tau: float) -> Metrics:
    """How well these tell the given labels that are right (see `split_quality`), where that is known. A collective.

    Args:
        context: of the run.
        clean_probability: (owned,) of the given labels, NaN where not seen.
        tau: above it a label counts as right.
    """
    clean, truth = context.world.all_gather(clean_probability), None
    if context.clean is not None and context.world.is_main:  # it reports
        truth = context.clean == context.labels
    return split_quality(clean, truth, tau)


def finite(losses: Tensor, what: str) -> Tensor:
    """The losses, if they are (else UserError)."""
    if not losses.isfinite().all():
        raise UserError(f"{what} has diverged (loss not finite); lower optim.lr or set optim.clip_norm")
    return losses


class Sweep(Pass):
    """Every training sample, or every one of a population, once.

    Args:
        context: of the run.
        name: of the pass.
        population: sorted ids; None = all.
    """

    trains = False

    def __init__(self, context: Context, name: str, population: np.ndarray | None = None) -> None:
        self.context, self.name, self._population = context, name, population
        self.batch = {"all": context.config.train.eval_batch_size}
        self.num_samples = len(context.train) if population is None else len(population)

    def plan(self) -> Plan:
        """See Pass."""
        return self.context.sweep(len(self.context.train), self._population)

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """See Pass."""
        batch = batches["all"]
        if len(batch.ids):
            self.see(batch, self.context.fixed_view(batch))
        return {}

    @abstractmethod
    def see(self, batch: Batch, images: Tensor) -> None:
        """Take in some samples, of which there is at least one, in their fixed view (b, 3, h, w)."""

    def finish(self) -> Metrics:
        """See Pass."""
        return {}


class FeatureSweep(Sweep):
    """Every sample's features into a column; those of an image that cannot be read stay as they are."""

    def __init__(self, context: Context, features: Output, column: Column, name: str = "features") -> None:
        super().__init__(context, name)
        self._features, self._column = features, column

    def see(self, batch: Batch, images: Tensor) -> None:
        """See Sweep."""
        self._column[batch.ids] = self._features(images)


class LossSweep(Sweep):
    """Every sample's loss and predicted class by some networks, into the table; then what is made of the losses.

    Columns: loss{NAME} (NaN where not seen) and predicted{NAME} of each network; `suggested`, the class that all of
    them together predict (-1 where not seen).

    Args:
        context: of the run.
        logits: of each network, by its name.
        after: makes of this finished sweep what there is to be made; gives metrics of it. A collective.
        name: of the pass.
        population: sorted ids; None = all.
        labels: that the losses are of; None = the given ones.
    """

    def __init__(
        self,
        context: Context,
        logits: Mapping[str, Output],
        after: Callable[["LossSweep"], Metrics],
        *,
        name: str = "sweep",
        population: np.ndarray | None = None,
        labels: Labels | None = None,
    ) -> None:
        super().__init__(context, name, population)
        self._logits, self._after, self._labels = logits, after, labels
        self._seen: list[tuple[Tensor, dict[str, Tensor]]] = []  # ids and new rows by column, on the device
        self._splits: dict[str, Split] = {}

    @staticmethod
    def add_columns(context: Context, *names: str) -> None:
        """The columns that sweeps by networks of these names write."""
        for name in names:
            context.table.add(f"loss{name}", torch.float32, fill=np.nan)
            context.table.add(f"predicted{name}", torch.int16, fill=-1)
        context.table.add("suggested", torch.int16, fill=-1)

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        if start_step == 0:
            for name in self._logits:
                self.context.table[f"loss{name}"].reset()

    def see(self, batch: Batch, images: Tensor) -> None:
        """See Sweep."""
        everyone = {name: logits(images) for name, logits in self._logits.items()}
        labels = batch.labels if self._labels is None else self._labels(batch.ids)
        rows = {"suggested": torch.stack([*everyone.values()]).sum(0).argmax(1)}
        for name, logits in everyone.items():
            rows[f"loss{name}"] = F.cross_entropy(logits, labels, reduction="none")
            rows[f"predicted{name}"] = logits.argmax(1)
        self._seen.append((batch.ids, rows))

    def sync(self) -> None:
        """See Pass. Until then nothing waits for the device."""
        if not self._seen:
            return
        all_ids, all_rows = zip(*self._seen, strict=True)
        self._seen = []
        ids = torch.cat(all_ids)
        for column in all_rows[0]:
            rows = torch.cat([rows[column] for rows in all_rows])
            if column.startswith("loss"):
                finite(rows, f"net{column.removeprefix('loss')}")
            self.context.table[column][ids] = rows

    @property
    def losses(self) -> dict[str, np.ndarray]:
        """This rank's losses (owned,) by each network, NaN where not seen."""
        return {name: self.context.table[f"loss{name}"].numpy() for name in self._logits}

    def divided(self, name: str, split: Split) -> Metrics:
        """Keep the division by a network's losses, to be plotted; returns its quality. A collective."""
        self._splits[f"net{name}"] = split
        quality = label_quality(self.context, split.clean_probability, split.tau)
        if split.mixture is not None:
            gap = float(np.ptp(split.mixture.means))
            quality |= {"mixture_iterations": split.mixture.num_iterations, "mixture_gap": gap}
        return {f"{key}{name}": value for key, value in quality.items()}

    def splits(self) -> dict[str, Split]:
        """See Pass."""
        return self._splits

    def finish(self) -> Metrics:
        """See Pass."""
        self.sync()
        return self._after(self)


class ClosingSweep(Sweep):
    """What the trained networks hold of every label, at the end of a run; and the verdicts of a method that has none.

    Each image is seen in its fixed view and in four of the views that were trained on: their mean is less of what was
    learnt by heart (measured in benchmarks/README.md).

    Args:
        context: of the run.
        logits: of all its networks together.
        verdicts: the method's own; None: the mixture over the networks' losses is to say them.

    Attributes:
        margins: float32 (owned,), of the mean logits of all views the given class's less the greatest other one; NaN
            where not seen.
        verdicts: the method's own, or, of the finished sweep, those of the mixture.
    """

    verdicts: Verdicts

    def __init__(self, context: Context, logits: Output, verdicts: Verdicts | None) -> None:
        super().__init__(context, "verdicts")
        self._logits, self._given = logits, verdicts
        num_owned = len(context.table.owned)
        self.margins = np.full(num_owned, np.nan, np.float32)
        self._losses, self._predicted = self.margins.copy(), np.full(num_owned, -1, np.int16)
        self._splits: dict[str, Split] = {}

    def resume_step(self, num_done: int) -> int | None:
        """What it has seen is in no checkpoint: it starts again."""
        return 0

    def see(self, batch: Batch, images: Tensor) -> None:
        """See Sweep."""
        random = (self.context.view(batch, number, self.name) for number in range(_NUM_RANDOM_VIEWS))
        every = torch.stack([self._logits(view).float() for view in (images, *random)])
        logits, labels = every.mean(0), batch.labels[:, None]
        losses = -every.log_softmax(2).mean(0).gather(1, labels)[:, 0]
        others = logits.scatter(1, labels, -torch.inf).amax(1)
        places = (batch.ids - self.context.table.owned.start).cpu().numpy()
        self.margins[places] = (logits.gather(1, labels)[:, 0] - others).cpu()
        self._losses[places] = finite(losses, "the run").cpu()
        self._predicted[places] = logits.argmax(1).cpu()

    def splits(self) -> dict[str, Split]:
        """See Pass."""
        return self._splits

    def finish(self) -> Metrics:
        """See Pass."""
        if self._given is not None:
            self.verdicts = self._given
            return {}
        context, losses = self.context, self._losses
        values, mixture = divide(losses, None, context.config.method.mixture, context.world)
        clean = np.full(len(losses), np.nan, np.float32)
        self.verdicts = Verdicts(clean, self._predicted)
        if mixture is None:
            return {}
        seen = ~np.isnan(values)
        clean[seen] = mixture.clean_probability(values[seen])
        self._splits["net"] = Split(values, clean, mixture, TAU)
        return label_quality(context, clean, TAU)
