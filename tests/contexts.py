"""What a method is given, outside a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nldist.config import Config
from nldist.dist.world import World
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.method import Method, Stage
from nldist.train.stages import TRAIN


def open_context(
    config: Config, world: World | None = None, stage: Stage = TRAIN, products: Mapping[str, Path] | None = None
) -> Context:
    """The context of one of a run's stages, alone or on a rank."""
    return Context(
        config,
        stage.name,
        stage.recipe(config),
        world or World.single(),
        Data.open(config.data),
        config.run.dir / "tables",
        products or {},
    )


def task_of(method: Method, epoch: int, name: str) -> Any:
    """The pass of this name that an epoch of a method has."""
    first = 0
    for phase in method.phases():
        if epoch < first + phase.num_epochs:
            (task,) = (task for task in phase.passes(epoch) if task.name == name)
            return task
        first += phase.num_epochs
    raise LookupError(f"{epoch} is past the last epoch")
