"""The pretext stage on the digits."""

from pathlib import Path

from nldist.config import Config
from nldist.config.file import load_config
from nldist.train.stages import stage_config
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


def stage(digits: Path, name: str, *overrides: str) -> Config:
    """The configuration of stage pretext with the method `name`."""
    config = load_config(DIGITS, [f"data.root={digits}", f"pretext.name={name}", *SETTINGS, *overrides])
    return stage_config("pretext", config, config.run.dir)
