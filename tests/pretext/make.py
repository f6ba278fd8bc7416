"""The pretext stage on the digits."""

from pathlib import Path

from nldist.config.file import load_config
from nldist.dist.world import World
from nldist.passes.context import Context
from nldist.pretext.stage import PRETEXT
from tests.contexts import open_context
from tests.jobs import DIGITS

_VIEW = "[{op: affine, degrees: 20, translate: [0.15, 0.15], scale: [0.8, 1.2], shear: 15, interpolation: bilinear}]"
SETTINGS = (
    "method.name=scanmix",
    f"pretext.view={_VIEW}",
    "pretext.batch_size=64",
    "pretext.optim.lr=0.05",
    "pretext.temperature=0.1",
    "pretext.queue=200",
    "pretext.knn_samples=null",
    "train.eval_batch_size=64",
)


def context_of(digits: Path, name: str, *overrides: str, world: World | None = None) -> Context:
    """The context of stage pretext with the method `name`."""
    config = load_config(DIGITS, [f"data.root={digits}", f"pretext.name={name}", *SETTINGS, *overrides])
    return open_context(config, world, PRETEXT)
