"""What people and scripts are told of a stage: lines, status, tracked metrics, plots, tables and the summary."""

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from nldist import __version__
from nldist.data.samples import Samples
from nldist.data.stream import Stream
from nldist.dist.checkpoint import Position
from nldist.dist.optimizer import batch_factor
from nldist.dist.stop import REQUEST
from nldist.passes.base import Pass, Split
from nldist.passes.context import Context
from nldist.passes.method import Method, Verdicts
from nldist.report import plots
from nldist.run.directory import RunDirectory
from nldist.run.status import StatusFile
from nldist.run.summary import closing_line, epoch_line, summarise
from nldist.track.tracker import Tracker
from nldist.train.meter import Watch, peak_memory_gib
from nldist.train.progress import Progress


class Reporter:
    """Tells of one stage; on ranks other than 0 it only takes part in what is gathered.

    Args:
        method: what is trained.
        stage: its name.
        run: its directory.
        status: of the whole run.
        tracker: of the stage.
    """

    def __init__(self, method: Method, stage: str, run: RunDirectory, status: StatusFile, tracker: Tracker) -> None:
        self._method, self._context, self._stage, self._run = method, method.context, stage, run
        self._status, self._tracker = status, tracker
        self._is_main = self._context.world.is_main
        tracker.artifact(run.path / "config.yaml")
        status.update(stage=stage, ends=None, every_seconds=self._context.config.track.every_seconds)

    def say(self, text: str) -> None:
        """Print a line."""
        if self._is_main:
            print(text, flush=True)

    def title(self, epoch: int) -> str:
        """What lines of an epoch begin with."""
        return ("" if self._stage == "train" else f"{self._stage}: ") + f"epoch {epoch + 1}/{self._method.num_epochs}"

    def resumed(self, checkpoint: str, world_size: int, version: str) -> None:
        """It goes on from this checkpoint, which so many ranks of this nldist have written."""
        self.say(f"resumed from {checkpoint} with {self._context.world.size} rank(s), written by {world_size}")
        if version != __version__:
            self.say(
                f"saved by nldist {version}, goes on with {__version__}: CHANGELOG.md has what is computed otherwise"
            )
        if world_size != self._context.world.size:
            self.say(_what_changes(self._context, world_size))

    def batch_size(self) -> None:
        """Training begins: what its global batch means for the learning rate."""
        optim, batch = self._context.recipe.optim, self._context.global_batch
        factor = batch_factor(optim, batch)
        if factor != 1:
            rule = f"lr {optim.lr:.4g} x {factor:.3g} (optim.lr_rule={optim.lr_rule})"
            self.say(f"global batch {batch} instead of {optim.lr_batch}: {rule}")

    def is_complete(self) -> bool:
        """Whether a start before this one has left the summary of all epochs. A collective."""
        summary, num_epochs = self._run.summary if self._is_main else None, self._method.num_epochs
        complete = self._context.world.broadcast_object(summary is not None and summary["epochs"] == num_epochs)
        if complete:
            self.say(f"nothing to do: {self._run.path} has its {num_epochs} epochs")
        return complete

    def step(self, task: Pass, stream: Stream, watch: Watch, num_done: int, progress: Progress) -> None:
        """So many steps of a pass are done, and a line is due."""
        if not self._is_main:
            return
        rates = watch.rates(stream.num_images * self._context.world.size, stream.wait_seconds)
        means, rate = progress.meter.means(), rates["images_per_second"]
        self.say(watch.line(num_done, rates, means))
        self._status.update(place=watch.title, step=num_done, num_steps=watch.num_steps, images_per_second=rate)
        if task.trains:
            values = {f"{task.name}/step_{name}": value for name, value in (means | rates).items()}
            self._tracker.log(values, epoch=progress.position.epoch + 1, step=progress.record["step"])

    def plots(self, task: Pass, epoch: int) -> None:
        """Draw what a finished pass has to show. A collective."""
        for name, drawing in task.curves().items():
            path = self._run.path / "plots" / f"{name}.png"
            if self._is_main:
                plots.curves(path, drawing.lines, ylabel=drawing.ylabel, title=drawing.title, xlabel=drawing.xlabel)
                self._tracker.artifact(path, "plots")
        every = self._context.config.track.histogram_every
        if (epoch + 1) % every == 0 or epoch == self._method.num_epochs:
            for name, split in task.splits().items():
                self._histogram(name, split, epoch)

    def _histogram(self, name: str, split: Split, epoch: int) -> None:
        context, losses = self._context, self._context.world.all_gather(split.losses)
        used = context.labels if split.labels is None else context.world.all_gather(split.labels)
        if not self._is_main:
            return
        seen, mixture, labels = ~np.isnan(losses), split.mixture, context.config.data.label_set or "given labels"
        ended = epoch == self._method.num_epochs
        when, file = ("at the end", "end") if ended else (f"epoch {epoch + 1}", f"epoch{epoch + 1:04d}")
        path = self._run.path / "plots" / f"losses-{name}-{file}.png"
        plots.loss_histogram(
            path,
            losses[seen],
            (mixture.means, mixture.variances, mixture.weights) if mixture else None,
            clean_mask=None if context.clean is None else (context.clean == used)[seen],
            tau=split.tau,
            title=f"{context.train.name}, {labels}: {name}, {when}",
        )
        self._tracker.artifact(path, "plots")

    def epoch(self, epoch: int, metrics: Mapping[str, Any], record: Mapping[str, Any], seconds: float) -> None:
        """An epoch has ended, that took so long."""
        facts = {
            "learning_rate": self._context.learning_rate(epoch),
            "gpu_memory_gib": peak_memory_gib(self._context.world.device),
        }
        self._tracker.log({**metrics, **facts}, epoch=epoch + 1, step=epoch + 1, kind="epoch")
        title, score, left = self.title(epoch), self._method.score, seconds * (self._method.num_epochs - epoch - 1)
        self.say(epoch_line(title, score, metrics, record, seconds, left))
        chosen = {name: metrics[name] for name in metrics if name == score or name.endswith("/loss")}
        self._status.update(
            place=f"{title} {metrics['phase']}",
            stage=self._stage,
            metrics=chosen | record["quality"],
            ends=time.time() + left,
        )

    def stopped(self, position: Position) -> None:
        """It has stopped on request, with all saved."""
        took = f" {time.monotonic() - REQUEST.since:.1f} s after the signal" if REQUEST.since else ""
        self.say(f"stopped at {position.name}, all saved{took}; the same command goes on from there")
        self._status.update(state="stopped")

    def samples(self, verdicts: Verdicts, num_epochs: int, margins: np.ndarray | None = None) -> None:
        """Leave what is known of every label after so many epochs; nothing, where that is nothing. A collective.

        `margins` (owned,) are known at the end of the run.
        """
        samples = _gathered(self._context, verdicts, margins, (num_epochs, self._method.num_epochs))
        if self._is_main and not np.isnan(samples.clean_probability).all():
            samples.write(self._run.path, self._context.train)

    def end(self, record: Mapping[str, Any]) -> None:
        """Leave what a person or a script reads: the curve of the scores, and at last the summary."""
        if not self._is_main:
            return
        self._score_curve(record["scores"])
        found = summarise(self._method.score, record, self._context.config.data.test_split)
        summary = {"stage": self._stage, **facts(self._context), **found}
        self._run.write_summary(summary)
        self._tracker.artifact(self._run.path / "summary.json")
        self.say(closing_line(self._run.path, summary))
        if self._tracker.open_command:
            self.say(f"MLflow: {self._tracker.open_command}")

    def _score_curve(self, scores: list[float]) -> None:
        """The score of every epoch that has one, where two or more have."""
        points = [(epoch, score) for epoch, score in enumerate(scores, start=1) if not math.isnan(score)]
        if len(points) < 2:
            return
        name = self._method.score
        label, path = name.replace("_", " "), self._run.path / "plots" / f"{name}.png"
        unit = " (%)" if name.endswith("accuracy") else ""
        epochs, values = zip(*points, strict=True)
        plots.curves(path, {self._run.path.name: (epochs, values)}, ylabel=f"{label}{unit}", title=f"{label} by epoch")
        self._tracker.artifact(path, "plots")


def _gathered(context: Context, verdicts: Verdicts, margins: np.ndarray | None, epochs: tuple[int, int]) -> Samples:
    """What all ranks know of the labels. A collective."""
    gather = context.world.all_gather
    clean, suggested = gather(verdicts.clean_probability), gather(verdicts.suggested)
    margin = np.full(len(clean), np.nan, np.float32) if margins is None else gather(margins)
    return Samples(context.labels, clean, suggested, margin, context.config.data.label_set, *epochs)


def _what_changes(context: Context, size_before: int) -> str:
    """What another number of ranks means for learning."""
    optim, batch = context.recipe.optim, context.global_batch
    before = batch // context.world.size * size_before
    rule = "lr stays (optim.lr_batch is not set)"
    if optim.lr_batch is not None:
        factors = [batch_factor(optim, size) for size in (before, batch)]
        rule = f"lr {optim.lr * factors[0]:.4g} -> {optim.lr * factors[1]:.4g} (optim.lr_rule={optim.lr_rule})"
    return f"another number of ranks: global batch {before} -> {batch}, {rule}; batches are other ones from here on"


def facts(context: Context) -> dict[str, Any]:
    """What names a run: in its summary, and as tags of its MLflow run."""
    config = context.config
    return {
        "method": config.method.name,
        "data_set": context.train.name,
        "label_set": config.data.label_set,
        "num_samples": len(context.train),
        "model": config.model.name,
        "seed": config.run.seed,
        "train_epochs": config.train.epochs,
        "world_size": context.world.size,
    }
