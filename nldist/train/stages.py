"""A run, from its configuration to its end: what is opened, and the stages that are run one after the other.

A stage before the training keeps its run directory in RUN/stages/NAME-DIGEST/ (or below run.stages_dir, for several
runs to share). The digest names what decides about its outcome: its settings, the images, and the digests of the stages
that it builds on. So a stage whose inputs have changed is another stage, and no finished one is lost. The number of
ranks is not in it: what a finished stage left is used on any number.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nldist.config import Config
from nldist.dist.checkpoint import Checkpoints
from nldist.dist.environment import num_restarts
from nldist.dist.stop import REQUEST
from nldist.dist.world import World
from nldist.errors import UserError, show_messages
from nldist.methods.build import build_method, method_class
from nldist.models import model_revision
from nldist.models.pretrained import weights_digest
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.method import Stage
from nldist.run.directory import RunDirectory
from nldist.run.status import SUMMARY_FILE, StatusFile
from nldist.track.source import source_tags
from nldist.track.store import store_uri
from nldist.track.tracker import NullTracker, Status, Tracker
from nldist.train.loop import Trainer
from nldist.train.progress import Progress
from nldist.train.reporter import Reporter, facts

TRAIN = Stage("train", lambda config: config.recipe, build_method)
_DYING_SECONDS = 300
_END_SECONDS, _STOP_SECONDS = 60, 3  # that MLflow gets at the end


def train(config: Config, only: Sequence[str] | None = None) -> int:
    """Run the configured method's stages (or `only` some of them), each going on from where it was.

    Returns the exit code.

    Raises:
        UserError: data, settings or run directory are wrong, or a stage that is needed has not been run.
    """
    stages = stages_of(config)
    wanted = _wanted(stages, only, config.method.name)
    REQUEST.listen()
    with World.start(**config.dist.model_dump()) as world:
        show_messages(world.is_main)
        run, status = RunDirectory(config.run.dir), StatusFile(config.run.dir, writes=world.is_main)
        if world.is_main:
            run.claim(config, patience_seconds=_patience_seconds())
        world.barrier()
        with contextlib.closing(run), status.of_job(world.size):
            data = Data.open(config.data)
            data.check(world)
            directories = world.broadcast_object(stage_directories(config, data.fingerprint(labels=False)))
            check_stages(config, data, directories, world.size)
            opened = _Run(config, world, data, directories, status)
            for stage in stages[:-1]:
                if code := opened.run_before(stage, wanted):
                    return code
            if TRAIN.name in wanted and (code := opened.run(TRAIN, run)):
                return code
            status.update(state="done" if TRAIN.name in wanted else f"done with {', '.join(wanted)}")
        return 0


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The stages of the configured method, the training last."""
    return (*method_class(config.method.name).stages, TRAIN)


def _wanted(stages: Sequence[Stage], only: Sequence[str] | None, method: str) -> list[str]:
    names = [stage.name for stage in stages]
    if unknown := [name for name in only or () if name not in names]:
        raise UserError(f"method {method} has no stage {unknown[0]!r}; its stages are {', '.join(names)}")
    return list(only or names)


def _patience_seconds() -> float:
    """A job that was started again may find its forerunner still dying, on a node that the cluster has lost."""
    return _DYING_SECONDS if num_restarts() else 0


def stage_directories(config: Config, images: str) -> dict[str, Path]:
    """The run directory of each stage before the training, in their order.

    `images` is the fingerprint of the training images.
    """
    root = config.run.stages_dir or config.run.dir / "stages"
    stages = stages_of(config)[:-1]
    model: dict[str, Any] = {}
    if stages and config.model.pretrained is not None:
        model["model.pretrained"] = weights_digest(config.model.pretrained)
    if (revision := model_revision(config.model.name)) > 1:
        model["model.revision"] = revision
    digests: dict[str, str] = {}
    for stage in stages:
        version, settings = stage.decides(config)
        inputs = [version, settings | model, images, [digests[need] for need in stage.needs]]
        digests[stage.name] = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]
    return {name: root / f"{name}-{digest}" for name, digest in digests.items()}


def check_stages(config: Config, data: Data, directories: Mapping[str, Path], world_size: int) -> None:
    """Refuse (UserError), before any stage begins, what one to be done would, and more than the disk has room for.

    A stage that was begun has written much of it already: it does not count.
    """
    needed = 0
    for stage in stages_of(config):
        path = directories.get(stage.name)
        if path is None or not (path / SUMMARY_FILE).exists():
            stage.check(config, data, world_size)
            needed += stage.num_bytes(config, data) if path is not None and not path.exists() else 0
    folder = (config.run.stages_dir or config.run.dir).absolute()
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(f"the stages leave {needed / 2**30:.1f} GiB below {place}, where {free / 2**30:.1f} are free")


@dataclass(frozen=True)
class _Run:
    """What is opened once, and used by every stage."""

    config: Config
    world: World
    data: Data
    directories: dict[str, Path]  # of the stages before the training
    status: StatusFile

    def run_before(self, stage: Stage, wanted: Sequence[str]) -> int:
        """Run a stage before the training if it is wanted and not done; returns the exit code."""
        run, names = RunDirectory(self.directories[stage.name]), list(self.directories)
        if _is_done(stage.name, run, self.world, claim=stage.name in wanted):
            return 0
        if stage.name not in wanted:
            if {TRAIN.name, *names[names.index(stage.name) :]} & set(wanted):
                command = f"nldist train ... --stages {stage.name}"
                raise UserError(f"stage {stage.name} is not done in {run.path}; run it first: {command}")
            return 0
        code = self.run(stage, run)
        self.world.barrier()
        if self.world.is_main:
            if code == 0:  # a finished stage is not gone on with: what it left are weights and tables
                shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
            run.close()
        return code

    def run(self, stage: Stage, run: RunDirectory) -> int:
        """Run one stage, whose directory is this job's, to its end; returns the exit code."""
        config, world = self.config, self.world
        context = Context(
            config, stage.name, stage.recipe(config), world, self.data, run.path / "tables", self.directories
        )
        method = stage.build(context)
        fingerprint = self.data.fingerprint(labels=method.uses_labels)
        checkpoints = Checkpoints(run.path / "checkpoints", world, config.train.keep_checkpoints, fingerprint)
        progress = Progress(method, checkpoints, run, stage.name)
        if world.is_main:
            run.write_config(config)
        tracker = open_tracker(config, stage, run.path, world)
        if world.is_main:
            tracker.set_tags({"stage": stage.name, **facts(context), **source_tags()})
        ended: Status = "FAILED"
        try:
            reporter = Reporter(method, stage.name, run, self.status, tracker)
            if progress.resumed is not None:
                reporter.resumed(*progress.resumed)
            stop = Trainer(method, progress, reporter).fit()
            if stop:
                reporter.stopped(progress.position)
            ended = "KILLED" if stop else "FINISHED"
        finally:
            # What MLflow lacks then is sent at the next start: who stops has no time to wait for a server.
            tracker.end(ended, _END_SECONDS if ended == "FINISHED" else _STOP_SECONDS)
        return stop.exit_code


def _is_done(name: str, run: RunDirectory, world: World, *, claim: bool) -> bool:
    """Whether a stage has ended; with `claim` one that has not is this job's from now on. A collective.

    Rank 0 decides, and looks again once the directory is its own: a job beside this one may have ended the stage.
    """
    done = False
    if world.is_main:
        done = run.summary is not None
        if claim and not done:
            advice = f"another job is running stage {name} there; start this one again when it is done"
            run.claim(None, advice, patience_seconds=_patience_seconds())
            done = run.summary is not None
            if done:
                run.close()
        if done:
            print(f"{name}: done before, {run.path}", flush=True)
    return world.broadcast_object(done)


def open_tracker(config: Config, stage: Stage, run_dir: Path, world: World) -> Tracker:
    """The record of a stage in `run_dir`: on rank 0 alone it does something."""
    if not world.is_main:
        return NullTracker()
    track, name = config.track, config.track.run_name or config.run.dir.name
    return Tracker(
        run_dir,
        uri=store_uri(config) if track.enabled else None,
        experiment=track.experiment,
        run_name=name if stage is TRAIN else f"{name} {stage.name}",
        params=config.flat() | {"world_size": world.size},
        system_metrics=track.system_metrics and track.enabled,
        parent=track.parent,
    )
