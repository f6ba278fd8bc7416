"""Stage pretext: self-supervised training of the backbone, by the method that its section names."""

from nldist.config import Config, PretextSection, Recipe
from nldist.passes.context import Context
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


PRETEXT = Stage(
    "pretext",
    _recipe,
    _build,
    settings=("pretext.",),
    views=lambda config: {"pretext.view": _section(config).view},
)
