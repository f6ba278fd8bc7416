"""Stages that chain: pretext -> mine -> cluster -> train, each a run of its own that takes over what came before.

A stage before the training keeps its run directory in RUN/stages/NAME-DIGEST/ (or below run.stages_dir, for several
runs to share). The digest names what decides about its outcome: its settings, the images, and the digests of the stages
that it builds on. So a stage whose inputs have changed is another stage, and no finished one is lost. The number of
ranks is not in it: what a finished stage left is used on any number.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nldist.config import ClusterSection, Config, PretextSection
from nldist.config.marks import naming
from nldist.dist.environment import num_restarts
from nldist.dist.stop import REQUEST
from nldist.dist.world import World
from nldist.errors import UserError, show_messages
from nldist.models import model_revision
from nldist.models.pretrained import weights_digest
from nldist.passes.context import Context
from nldist.passes.method import Method
from nldist.pretext.mine import Mine
from nldist.pretext.moco import MoCo
from nldist.pretext.scan import Scan
from nldist.pretext.simclr import SimCLR
from nldist.run.directory import RunDirectory
from nldist.run.status import StatusFile
from nldist.train.loop import Trainer, build_context, fingerprint_of

MAIN = "train"
_DYING_SECONDS = 300
_VERSION = 1  # of what stages compute: to be raised when the same settings come to mean something else
# Beginnings of the names of settings that decide about every stage.
_SHARED = ("run.seed", "model.", "data.mean", "data.std", "data.max_side", "data.window", "train.autocast")


@dataclass(frozen=True)
class Stage:
    """One stage before the training.

    Attributes:
        settings: beginnings of the names of the settings that decide about its outcome, beside the shared ones.
        needs: the stages that it builds on.
        derive: its configuration from the run's: epochs, batches, optimiser and views in their usual places.
        build: its method.
    """

    settings: tuple[str, ...]
    needs: tuple[str, ...]
    derive: Callable[[Config], Config]
    build: Callable[[Context], Method]


def _derive_pretext(config: Config) -> Config:
    assert config.pretext is not None
    return _derive(config, config.pretext)


def _derive_mine(config: Config) -> Config:
    if config.mine.view is None:
        return config
    return config.model_copy(update={"views": config.views.model_copy(update={"eval": config.mine.view})})


def _derive_cluster(config: Config) -> Config:
    assert config.cluster is not None
    return _derive(config, config.cluster)


def _derive(config: Config, section: PretextSection | ClusterSection) -> Config:
    changes = {"epochs": section.epochs, "batch_size": section.batch_size, "ema_decay": None}
    train = config.train.model_copy(update=changes)
    views = config.views.model_copy(update={"train": section.view})
    return config.model_copy(update={"optim": section.optim, "train": train, "views": views})


def _build_pretext(context: Context) -> Method:
    assert context.config.pretext is not None
    return {"simclr": SimCLR, "moco": MoCo}[context.config.pretext.name](context)


STAGES = {
    "pretext": Stage(("pretext.",), (), _derive_pretext, _build_pretext),
    "mine": Stage(("mine.", "views.eval"), ("pretext",), _derive_mine, Mine),
    "cluster": Stage(("cluster.", "views.eval"), ("pretext", "mine"), _derive_cluster, Scan),
}
CHAINS: dict[str, tuple[str, ...]] = {"scanmix": ("pretext", "mine", "cluster")}


def train(config: Config, only: Sequence[str] | None = None) -> int:
    """Run the configured method's stages (or `only` some of them), each going on from where it was.

    Returns the exit code.

    Raises:
        UserError: data, settings or run directory are wrong, or a stage that is needed has not been run.
    """
    chain = (*CHAINS.get(config.method.name, ()), MAIN)
    if unknown := [stage for stage in only or () if stage not in chain]:
        raise UserError(f"method {config.method.name} has no stage {unknown[0]!r}; its stages are {', '.join(chain)}")
    REQUEST.listen()
    with World.start(**config.dist.model_dump()) as world:
        show_messages(world.is_main)
        run, status = RunDirectory(config.run.dir), StatusFile(config.run.dir, writes=world.is_main)
        if world.is_main:
            run.claim(config, patience_seconds=_patience_seconds())
        world.barrier()
        with status.of_job(world.size):
            code = _run_chain(config, world, run, status, chain, only or chain)
            if code == 0:
                done = MAIN in (only or chain)
                status.update(state="done" if done else f"done with {', '.join(only or ())}")
        return code


def _patience_seconds() -> float:
    """A job that was started again may find its forerunner still dying, on a node that the cluster has lost."""
    return _DYING_SECONDS if num_restarts() else 0


def _run_chain(
    config: Config, world: World, run: RunDirectory, status: StatusFile, chain: Sequence[str], wanted: Sequence[str]
) -> int:
    products: dict[str, Path] = {}
    if len(chain) > 1:
        images = fingerprint_of(build_context(config, world), labels=False)
        products = world.broadcast_object(stage_directories(config, images))
    for name, path in products.items():
        stage = RunDirectory(path)
        if _is_done(name, stage, world, claim=name in wanted):
            continue
        if name in wanted:
            if code := _run_stage(name, config, world, stage, status, products):
                return code
        elif set(wanted) & set(chain[chain.index(name) :]):
            raise UserError(f"stage {name} is not done in {path}; run it first: nldist train ... --stages {name}")
    if MAIN not in wanted:
        return 0
    return Trainer(build_context(config, world, products), run, status=status).fit()


def stage_directories(config: Config, images: str) -> dict[str, Path]:
    """The run directory of each stage before the training, in their order.

    `images` is the fingerprint of the training images.
    """
    root = config.run.stages_dir or config.run.dir / "stages"
    model: dict[str, Any] = {}
    if config.model.pretrained is not None:
        model["model.pretrained"] = weights_digest(config.model.pretrained)
    if (revision := model_revision(config.model.name)) > 1:
        model["model.revision"] = revision
    digests: dict[str, str] = {}
    directories = {}
    for name in CHAINS.get(config.method.name, ()):
        stage = STAGES[name]
        inputs = [_VERSION, _deciding(stage, config) | model, images, [digests[need] for need in stage.needs]]
        digests[name] = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:10]
        directories[name] = root / f"{name}-{digests[name]}"
    return directories


def _deciding(stage: Stage, config: Config) -> dict[str, Any]:
    """The settings that decide about a stage's outcome, by name."""
    names = (*_SHARED, *stage.settings)
    return {name: value for name, value in naming(stage.derive(config)).items() if name.startswith(names)}


def stage_config(name: str, config: Config, path: Path) -> Config:
    """The configuration of a stage before the training, kept in `path`."""
    uri = config.track.uri or f"sqlite:///{config.run.dir.absolute().parent / 'mlflow.db'}"
    run_name = f"{config.track.run_name or config.run.dir.name} {name}"
    track = config.track.model_copy(update={"uri": uri, "run_name": run_name})
    run = config.run.model_copy(update={"dir": path})
    return STAGES[name].derive(config).model_copy(update={"run": run, "track": track})


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
                run.release()
        if done:
            print(f"{name}: done before, {run.path}", flush=True)
    return world.broadcast_object(done)


def _run_stage(
    name: str, config: Config, world: World, run: RunDirectory, status: StatusFile, products: dict[str, Path]
) -> int:
    """Run one stage, whose directory is this job's, to its end; returns the exit code."""
    context = build_context(stage_config(name, config, run.path), world, products)
    code = Trainer(context, run, STAGES[name].build, name, status).fit()
    world.barrier()
    if world.is_main:
        if code == 0:  # a finished stage is not gone on with: what it left are weights and tables
            shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        run.release()
    return code
