"""The training loop: phases, epochs, passes and steps; when to save, when to stop. It knows no method."""

import math
import time
from typing import Any

import torch

from nldist.data.stream import Stream
from nldist.dist.checkpoint import Position
from nldist.dist.stop import Stop
from nldist.dist.stop_check import StopCheck
from nldist.errors import UserError
from nldist.passes.base import Pass
from nldist.passes.evaluate import EvaluationPass
from nldist.passes.method import Method, Phase
from nldist.passes.sweep import ClosingSweep
from nldist.run.summary import measured, quality
from nldist.train.meter import Meter, Watch
from nldist.train.progress import Progress
from nldist.train.reporter import Reporter

_STOP_CHECK_SECONDS = 1.0


class Trainer:
    """Trains one stage of a run on this rank, from where its last checkpoint left it.

    Args:
        method: what is trained.
        progress: where it is.
        reporter: is told of everything.
    """

    def __init__(self, method: Method, progress: Progress, reporter: Reporter) -> None:
        self.method, self.progress, self.reporter = method, progress, reporter
        self.context, self.config, self.world = method.context, method.context.config, method.context.world
        self._stream: Stream | None = None  # of the present pass
        self._steps_since_save = 0
        self._stop_check: StopCheck  # of the present pass
        self._stop = Stop.NONE

    def fit(self) -> Stop:
        """Run what is left; returns why it ended: Stop.NONE where all is done."""
        progress, num_epochs = self.progress, self.method.num_epochs
        if progress.position.epoch >= num_epochs and self.reporter.is_complete():
            return Stop.NONE
        if num_epochs == 0:
            progress.save_weights(0, {})
        for epoch in range(progress.position.epoch, num_epochs):
            began, phase = time.perf_counter(), self._phase(epoch)
            passes: list[Pass] = [*phase.passes(epoch), *self.method.evaluation(epoch)]
            for task in passes[progress.position.pass_index :]:
                if not self._run_pass(task, f"{self.reporter.title(epoch)} {phase.name}"):
                    return self._stop
            self._end_epoch(epoch, phase, time.perf_counter() - began)
        if self.method.uses_labels:
            self._closing_sweep()
        if self.method.uses_labels and not self._stop and self.context.data.test is not None:
            self._measure_best()
        if not self._stop:
            self.reporter.end(progress.record)
        return self._stop

    def _phase(self, epoch: int) -> Phase:
        for phase in self.method.phases():
            if epoch < phase.num_epochs:
                return phase
            epoch -= phase.num_epochs
        raise AssertionError("the phases' epochs do not add up to the stage's")

    def _run_pass(self, task: Pass, title: str) -> bool:
        """Run one pass from the present position to its end; False if stopped on the way, with all saved."""
        progress, record = self.progress, self.progress.record
        if task.trains and not record["train_seconds"]:
            self.reporter.batch_size()
        sent_before = self.world.sent_bytes
        plan, start = task.plan(), progress.position.step
        task.start(plan.num_steps, start)
        stream = self._stream = self.context.stream(task.split, plan, start)
        self._stop_check = StopCheck(self.world, _STOP_CHECK_SECONDS, start)
        watch = Watch(f"{title} {task.name}", plan.num_steps, start, self.config.track.every_seconds)
        for step, batches in enumerate(stream, start=start):
            if task.trains and not task.usable(batches):
                raise UserError(f"step {step} of {task.name} has no readable image: {stream.first_bad}")
            self._seed(step)
            progress.meter.add(task.step(batches, step))
            record["step"] += task.trains
            if watch.due():
                self.reporter.step(task, stream, watch, step + 1, progress)
            if not self._continue_after(task, step + 1):
                return False
        self._finish_pass(task, stream, watch)
        record["epoch"][f"{task.name}/sent_mib"] = (self.world.sent_bytes - sent_before) / 2**20
        progress.position = Position(progress.position.epoch, progress.position.pass_index + 1, 0)
        return True

    def _seed(self, step: int) -> None:
        """Make what draws from torch's global generators (dropout) a function of the step, so that it resumes."""
        position = self.progress.position
        self.world.seed(self.context.seed("torch", position.epoch, position.pass_index, step, self.world.rank))

    def _continue_after(self, task: Pass, num_done: int) -> bool:
        """Save and stop where due, at edges that all ranks share; False to stop."""
        self._steps_since_save += 1
        resume_step = task.resume_step(num_done)
        if resume_step is None:
            return True
        self._stop = self._stop_check.due(num_done)
        every = (
            self.config.train.checkpoint_every_steps if resume_step else 0
        )  # nothing is saved of a pass that starts again
        if self._stop or 0 < every <= self._steps_since_save:
            position = self.progress.position
            task.sync()
            self._save(Position(position.epoch, position.pass_index, resume_step), any_world=task.any_world)
        return not self._stop

    def _finish_pass(self, task: Pass, stream: Stream, watch: Watch) -> None:
        """Gather what the pass found into the epoch's metrics."""
        progress, record = self.progress, self.progress.record
        counts = torch.tensor([stream.num_images, self._num_bad()])  # images: of the time that `watch` has seen
        num_images, num_bad = self.world.all_reduce(counts).tolist()
        if task.trains:
            record["train_images"] += num_images
            record["train_seconds"] += watch.seconds
        record["num_bad"] += num_bad
        progress.check_finite()
        found = progress.meter.reduce(self.world) | watch.rates(num_images, stream.wait_seconds)
        record["epoch"] |= {f"{task.name}/{name}": value for name, value in found.items()}
        record["epoch"] |= task.finish()
        progress.meter, progress.num_bad_before, self._stream = Meter(), 0, None
        self.reporter.plots(task, progress.position.epoch)

    def _num_bad(self) -> int:
        """Bad records of the present pass on this rank."""
        return self.progress.num_bad_before + (self._stream.num_bad if self._stream else 0)

    def _save(self, position: Position, *, any_world: bool = False) -> None:
        self.progress.save(position, self._num_bad() if position.step else 0, any_world=any_world)
        self._steps_since_save = 0

    def _end_epoch(self, epoch: int, phase: Phase, seconds: float) -> None:
        """Tell of the epoch, keep its weights, and save."""
        record = self.progress.record
        metrics, record["epoch"] = record["epoch"] | {"phase": phase.name}, {}
        score = float(metrics.get(self.method.score, math.nan))
        record["scores"].append(score)
        self.progress.measure(metrics)
        record["quality"] = quality(metrics)
        self.reporter.epoch(epoch, metrics, record, seconds)
        if (verdicts := self.method.verdicts()) is not None:
            self.reporter.samples(verdicts, epoch + 1)
        self.progress.save_weights(epoch + 1, metrics)
        self._save(Position(epoch + 1))

    def _closing_sweep(self) -> None:
        """What the trained networks hold of the labels."""
        record = self.progress.record
        task = ClosingSweep(self.context, self.method.logits, self.method.verdicts())
        if self._run_pass(task, "at the end"):
            record["quality"] = quality(self._closed()) or record["quality"]
            self.reporter.samples(task.verdicts, self.method.num_epochs, task.margins)

    def _measure_best(self) -> None:
        """What the networks that the evaluation split has chosen come to on the test split."""
        task = EvaluationPass(self.context, self.progress.best().predictors(), "test")
        if self._run_pass(task, "weights/best.pt"):
            self.progress.record["chosen"] = measured(self._closed())

    def _closed(self) -> dict[str, Any]:
        """What a pass after the last epoch has found. It belongs to no epoch: more of them may follow."""
        found, self.progress.record["epoch"] = self.progress.record["epoch"], {}
        self.progress.position = Position(self.method.num_epochs)
        return dict(found)
