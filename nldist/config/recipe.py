"""How one stage of a run trains."""

from dataclasses import dataclass

from nldist.config.training import OptimSection
from nldist.data.views import ViewOp


@dataclass(frozen=True)
class Recipe:
    """How one stage of a run trains: the training itself by `train`, `optim` and `views`, one before it by its section.

    Attributes:
        epochs: in all.
        batch_size: samples per step, rank and network.
        optim: optimiser and learning rate.
        train_view: random view, unless a pass names another one.
        eval_view: fixed view.
        ema_decay: of the averaged weights that are evaluated, per step; None: there are none.
    """

    epochs: int
    batch_size: int
    optim: OptimSection
    train_view: list[ViewOp]
    eval_view: list[ViewOp]
    ema_decay: float | None = None
