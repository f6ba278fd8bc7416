"""Stage pretext: self-supervised training of the backbone, by the method that its section names."""

from nldist.config import Config, PretextSection, Recipe
from nldist.errors import UserError
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.method import Method, Stage
from nldist.pretext.moco import MoCo
from nldist.pretext.simclr import SimCLR


def _section(config: Config) -> PretextSection:
    assert config.pretext is not None
    return config.pretext


def _recipe(config: Config) -> Recipe:
    section = _section(config)
    view = config.view(section.view)
    return Recipe(section.epochs, section.batch_size, section.optim, view, config.views.eval)


def _build(context: Context) -> Method:
    return {"simclr": SimCLR, "moco": MoCo}[_section(context.config).name](context)


def _check(config: Config, _: Data, world_size: int) -> None:
    section = _section(config)
    batch = section.batch_size * world_size
    if section.name == "moco" and section.queue < batch:
        raise UserError(
            f"pretext.queue={section.queue} is smaller than a step's {batch} images "
            f"(pretext.batch_size times {world_size} ranks); set {batch} or more"
        )


PRETEXT = Stage(
    "pretext",
    _recipe,
    _build,
    settings=("pretext.",),
    views=lambda config: {"pretext.view": _section(config).view},
    check=_check,
)
