"""The training loop: phases, epochs, passes and steps; checkpoints, resume, stop. It knows no method."""

import math
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nldist import __version__
from nldist.config import Config
from nldist.data.index import Index
from nldist.data.stream import Stream
from nldist.dist.checkpoint import Checkpoints, Position
from nldist.dist.optimizer import batch_factor
from nldist.dist.stop import REQUEST, Stop
from nldist.dist.table import SampleTable
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.methods.build import build_method
from nldist.models import model_revision
from nldist.passes.base import Pass
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase
from nldist.run.directory import RunDirectory
from nldist.run.status import StatusFile
from nldist.track.tracker import NullTracker, Status, Tracker
from nldist.train import reporter
from nldist.train.meter import Meter, Watch, peak_memory_gib

_STEPS_BETWEEN_STOP_CHECKS = 8
_END_SECONDS, _STOP_SECONDS = 60, 3  # that MLflow gets at the end


def build_context(config: Config, world: World, products: Mapping[str, Path] | None = None) -> Context:
    """Open the data set and its labels; `products` are the run directories of the stages before this one."""
    data = config.data
    index = Index.open(data.root, data.train_split, data.cache_dir)
    evaluation = Index.open(data.root, data.eval_split, data.cache_dir)
    if index.classes != evaluation.classes:
        raise UserError(f"{data.root}: splits {data.train_split} and {data.eval_split} have different classes")
    check_size(len(index), world.size)
    clean = index.labels(data.clean_label_set) if data.clean_label_set in index.label_sets() else None
    table = SampleTable(len(index), world)
    labels, directory = index.labels(data.label_set), config.run.dir / "tables"
    return Context(config, world, index, evaluation, labels, clean, table, directory, products or {})


def fingerprint_of(context: Context, labels: bool) -> str:
    """The data's fingerprint, after checking that every node's copy has the same. A collective."""
    fingerprint = context.fingerprint(labels=labels)
    if context.world.broadcast_object(fingerprint) != fingerprint:
        raise UserError(f"{context.config.data.root} on {socket.gethostname()} is not the data set that rank 0 sees")
    return fingerprint


def check_size(num_samples: int, world_size: int) -> None:
    """Refuse (UserError) more ranks than there are pairs of training samples."""
    if num_samples < 2 * world_size:
        raise UserError(f"{num_samples} training samples are too few for {world_size} ranks; use fewer")


class Trainer:
    """One stage of a run on this rank: the training itself (stage "train"), or one before it."""

    def __init__(
        self,
        context: Context,
        run: RunDirectory,
        build: Callable[[Context], Method] = build_method,
        stage: str = "train",
        status: StatusFile | None = None,
    ) -> None:
        self.context, self.run, self.stage = context, run, stage
        self.status = status or StatusFile(run.path, writes=context.world.is_main)
        self.config, self.world = context.config, context.world
        self.method = build(context)
        self.method.check(self.world.size)
        self.num_epochs = sum(phase.num_epochs for phase in self.method.phases())
        keep, fingerprint = self.config.train.keep_checkpoints, fingerprint_of(context, self.method.uses_labels)
        self.checkpoints = Checkpoints(run.path / "checkpoints", self.world, keep, fingerprint)
        self.position = Position()
        # What the checkpoint keeps of the run's history.
        self.record: dict[str, Any] = {
            "step": 0,
            "seconds": 0.0,
            "train_images": 0,
            "train_seconds": 0.0,
            "num_bad": 0,
            "scores": [],  # the method's score, by epoch; NaN where it was not measured
            "epoch": {},  # metrics of the present epoch's finished passes
            "quality": {},  # of the latest division
        }
        self.meter = Meter()
        self._stream: Stream | None = None  # of the present pass
        self._bad_before = 0  # bad records of the present pass before it was resumed
        self._steps_since_save, self._steps_since_check = 0, 0
        self._stop = Stop.NONE
        self._resume()
        self._began = time.perf_counter() - self.record["seconds"]
        if self.world.is_main:
            run.write_config(self.config)
        self.tracker = self._open_tracker()
        self.status.update(stage=stage, ends=None, every_seconds=self.config.track.every_seconds)

    def _resume(self) -> None:
        path = self.checkpoints.latest()
        if path is None:
            self.method.start()
            return
        self.position, shared, rank = self.checkpoints.load(path, self.context.table)
        self.method.load_state_dict(shared["method"])
        self.record = shared["record"]
        if rank is not None:
            self.method.load_rank_state_dict(rank["method"])
            self.meter, self._bad_before = Meter(rank["meter"]), rank["num_bad"]
        self._say(f"resumed from {path.name} with {self.world.size} rank(s), written by {shared['world_size']}")
        if (version := shared.get("nldist", "0.1.0")) != __version__:
            self._say(
                f"saved by nldist {version}, goes on with {__version__}: CHANGELOG.md has what is computed otherwise"
            )
        if shared["world_size"] != self.world.size:
            self._say(self._what_changes(shared["world_size"]))

    def _what_changes(self, size_before: int) -> str:
        """What another number of ranks means for learning."""
        optim, batch = self.config.optim, self.context.global_batch
        before = batch // self.world.size * size_before
        rule = "lr stays (optim.lr_batch is not set)"
        if optim.lr_batch is not None:
            factors = [batch_factor(optim, size) for size in (before, batch)]
            rule = f"lr {optim.lr * factors[0]:.4g} -> {optim.lr * factors[1]:.4g} (optim.lr_rule={optim.lr_rule})"
        return f"another number of ranks: global batch {before} -> {batch}, {rule}; batches are other ones from here on"

    def _say_batch(self) -> None:
        factor = batch_factor(self.config.optim, self.context.global_batch)
        if factor != 1:
            optim = self.config.optim
            self._say(
                f"global batch {self.context.global_batch} instead of {optim.lr_batch}: "
                f"lr {optim.lr:.4g} x {factor:.3g} (optim.lr_rule={optim.lr_rule})"
            )

    def _open_tracker(self) -> Tracker:
        if not self.world.is_main:
            return NullTracker()
        track = self.config.track
        uri = track.uri or f"sqlite:///{self.run.path.absolute().parent / 'mlflow.db'}"
        tracker = Tracker(
            self.run.path,
            uri=uri if track.enabled else None,
            experiment=track.experiment,
            run_name=track.run_name or self.run.path.name,
            params=self.config.flat() | {"world_size": self.world.size},
            system_metrics=track.system_metrics and track.enabled,
        )
        tracker.artifact(self.run.path / "config.yaml")
        return tracker

    def fit(self) -> int:
        """Run what is left of the epochs; returns the exit code."""
        status: Status = "FAILED"
        try:
            code = self._fit()
            status = "KILLED" if self._stop else "FINISHED"
        finally:
            # What MLflow lacks then is sent at the next start: who stops has no time to wait for a server.
            self.tracker.end(status, _END_SECONDS if status == "FINISHED" else _STOP_SECONDS)
        return code

    def _fit(self) -> int:
        num_epochs = self.num_epochs
        if self.position.epoch >= num_epochs:
            self._say(f"nothing to do: {self.run.path} has its {num_epochs} epochs")
        if num_epochs == 0 and self.world.is_main:
            self._save_weights(0, math.nan)
        for epoch in range(self.position.epoch, num_epochs):
            began = time.perf_counter()
            phase = self._phase(epoch)
            passes: list[Pass] = [*phase.passes(epoch), *self.method.evaluation(epoch)]
            for task in passes[self.position.pass_index :]:
                if not self._run_pass(task, f"{self._title(epoch)} {phase.name}"):
                    return self._stopped()
            self._end_epoch(epoch, phase, time.perf_counter() - began)
        self._end()
        return 0

    def _phase(self, epoch: int) -> Phase:
        for phase in self.method.phases():
            if epoch < phase.num_epochs:
                return phase
            epoch -= phase.num_epochs
        raise AssertionError("the phases' epochs do not add up to train.epochs")

    def _title(self, epoch: int) -> str:
        return ("" if self.stage == "train" else f"{self.stage}: ") + f"epoch {epoch + 1}/{self.num_epochs}"

    def _run_pass(self, task: Pass, title: str) -> bool:
        """Run one pass from the present position to its end; False if stopped on the way, with all saved."""
        if task.trains and not self.record["train_seconds"]:
            self._say_batch()
        sent_before = self.world.sent_bytes
        plan, start = task.plan(), self.position.step
        task.start(plan.num_steps, start)
        stream = self._stream = self.context.stream(task.split, plan, start)
        watch = Watch(f"{title} {task.name}", plan.num_steps, start, self.config.track.every_seconds)
        for step, batches in enumerate(stream, start=start):
            if task.trains and not task.usable(batches):
                raise UserError(f"step {step} of {task.name} has no readable image: {stream.first_bad}")
            self._seed(step)
            self.meter.add(task.step(batches, step))
            self.record["step"] += task.trains
            if watch.due():
                self._report_step(task, stream, watch, step + 1)
            if not self._continue_after(task, step + 1):
                return False
        self._finish_pass(task, stream, watch)
        self.record["epoch"][f"{task.name}/sent_mib"] = (self.world.sent_bytes - sent_before) / 2**20
        self.position = Position(self.position.epoch, self.position.pass_index + 1, 0)
        return True

    def _seed(self, step: int) -> None:
        """Make what draws from torch's global generator (dropout) a function of the step, so that it resumes."""
        place = [self.config.run.seed, self.position.epoch, self.position.pass_index, step, self.world.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _continue_after(self, task: Pass, num_done: int) -> bool:
        """Save and stop where due, at edges that all ranks share; False to stop."""
        self._steps_since_save += 1
        self._steps_since_check += 1
        resume_step = task.resume_step(num_done)
        if resume_step is None:
            return True
        if self._steps_since_check >= _STEPS_BETWEEN_STOP_CHECKS:
            self._steps_since_check, self._stop = 0, self.world.should_stop()
        if self._stop or 0 < self.config.train.checkpoint_every_steps <= self._steps_since_save:
            self._save(Position(self.position.epoch, self.position.pass_index, resume_step))
        return not self._stop

    def _finish_pass(self, task: Pass, stream: Stream, watch: Watch) -> None:
        """Gather what the pass found into the epoch's metrics."""
        counts = torch.tensor([stream.num_images, self._num_bad()])  # images: of the time that `watch` has seen
        num_images, num_bad = self.world.all_reduce(counts).tolist()
        if task.trains:
            self.record["train_images"] += num_images
            self.record["train_seconds"] += watch.seconds
        self.record["num_bad"] += num_bad
        self._check_finite()
        means = self.meter.reduce(self.world)
        prefix = f"{task.name}/"
        rates = watch.rates(num_images, stream.wait_seconds)
        self.record["epoch"] |= {prefix + name: value for name, value in (means | rates).items()}
        self.record["epoch"] |= task.finish()
        self.meter, self._stream, self._bad_before = Meter(), None, 0
        for name, curves in task.curves().items():
            self._plot(reporter.curves(self.run.path, name, curves) if self.world.is_main else None)
        if (self.position.epoch + 1) % self.config.track.histogram_every == 0:
            for name, split in task.splits().items():
                self._plot(reporter.loss_histogram(self.run.path, self.context, self.position.epoch, name, split))

    def _report_step(self, task: Pass, stream: Stream, watch: Watch, num_done: int) -> None:
        if not self.world.is_main:
            return
        rates = watch.rates(stream.num_images * self.world.size, stream.wait_seconds)
        means = self.meter.means()
        self._say(watch.line(num_done, rates, means))
        rate = rates["images_per_second"]
        self.status.update(place=watch.title, step=num_done, num_steps=watch.num_steps, images_per_second=rate)
        if task.trains:
            values = {f"{task.name}/step_{name}": value for name, value in (means | rates).items()}
            self.tracker.log(values, epoch=self.position.epoch + 1, step=self.record["step"])

    def _end_epoch(self, epoch: int, phase: Phase, seconds: float) -> None:
        """Log the epoch, keep its weights, and save."""
        metrics = self.record["epoch"] | {
            "phase": phase.name,
            "learning_rate": self.context.learning_rate(epoch),
            "gpu_memory_gib": peak_memory_gib(self.world.device),
        }
        score = float(metrics.get(self.method.score, math.nan))
        self.record["scores"].append(score)
        self.record["epoch"] = {}
        self.record["quality"] = reporter.split_means(metrics)
        self.tracker.log(metrics, epoch=epoch + 1, step=epoch + 1, kind="epoch")
        left = seconds * (self.num_epochs - epoch - 1)
        self._say(reporter.epoch_line(self._title(epoch), self.method.score, metrics, self.record, seconds, left))
        self.status.update(
            place=f"{self._title(epoch)} {phase.name}",
            stage=self.stage,
            metrics={name: metrics[name] for name in metrics if name == self.method.score or name.endswith("/loss")}
            | self.record["quality"],
            ends=time.time() + left,
        )
        if self.world.is_main:
            self._save_weights(epoch + 1, score)
        self._save(Position(epoch + 1))

    def _save_weights(self, num_epochs: int, score: float) -> None:
        weights = self.method.weights()
        facts = {
            "stage": self.stage,
            "model": self.config.model.name,
            "model_revision": model_revision(self.config.model.name),
            "classes": self.context.train.classes,
            "epoch": num_epochs,
            self.method.score: score,
        }
        self.run.save_weights("last", weights, facts)
        if not math.isnan(score) and score >= np.nanmax(self.record["scores"]):
            self.run.save_weights("best", weights, facts)

    def _num_bad(self) -> int:
        """Bad records of the present pass on this rank."""
        return self._bad_before + (self._stream.num_bad if self._stream else 0)

    def _check_finite(self) -> None:
        """Before anything is saved: a run must not go on from what has diverged."""
        for name, value in self.meter.means().items():
            if not math.isfinite(value):
                # A stage with other settings is in another directory anyhow.
                optim, where = f"{self.stage}.optim", ""
                if self.stage == "train":
                    optim, where = "optim", ", in another run.dir"
                raise UserError(f"{name} has become {value}: lower {optim}.lr or set {optim}.clip_norm{where}")

    def _save(self, position: Position) -> None:
        self._check_finite()
        self.position = position
        self.record["seconds"] = time.perf_counter() - self._began
        shared = {
            "method": self.method.state_dict(),
            "record": self.record,
            "model_revision": model_revision(self.config.model.name),
            "nldist": __version__,
        }
        rank = {
            "method": self.method.rank_state_dict(),
            "meter": self.meter.state_dict(),
            "num_bad": self._num_bad() if position.step else 0,
        }
        self.checkpoints.save(position, shared, rank, self.context.table)
        self._steps_since_save = 0

    def _stopped(self) -> int:
        took = f" {time.monotonic() - REQUEST.since:.1f} s after the signal" if REQUEST.since else ""
        self._say(f"stopped at {self.position.name}, all saved{took}; the same command goes on from there")
        self.status.update(state="stopped")
        return self._stop.exit_code

    def _end(self) -> None:
        """Leave what a person or a script reads: plots, the samples' table, and at last the summary."""
        samples = reporter.sample_columns(self.context, len(self.method.engines))
        if not self.world.is_main:
            return
        if samples:
            reporter.write_samples(self.run.path / "tables" / "samples.parquet", self.context, samples)
        score = self.method.score
        self._plot(reporter.score_curve(self.run.path, score, self.record["scores"]))
        summary = reporter.summary(self.stage, score, self.context, self.record)
        self.run.write_summary(summary)
        self.tracker.artifact(self.run.path / "summary.json")
        self._say(reporter.closing_line(self.run.path, summary))
        if self.tracker.open_command:
            self._say(f"MLflow: {self.tracker.open_command}")

    def _plot(self, path: Path | None) -> None:
        if path is not None:
            self.tracker.artifact(path, "plots")

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)
