"""The configured engine around a network."""

from torch import nn

from nldist.config import Config, Recipe
from nldist.dist.deepspeed_engine import DeepSpeedEngine
from nldist.dist.engine import DDPEngine, Engine
from nldist.dist.world import World


def build_engine(
    model: nn.Module, config: Config, world: World, recipe: Recipe | None = None, *, partly: bool = False
) -> Engine:
    """The engine that `config.engine` names, with `model` as its network, trained by `recipe` (default: the run's own).

    With `partly` a step may leave parts of the network out: what has no gradient then stays as it is.

    Raises:
        UserError: DeepSpeed cannot do what the configuration wants.
    """
    kind = DeepSpeedEngine if config.engine.name == "deepspeed" else DDPEngine
    return kind(model, config, world, recipe, partly=partly)
