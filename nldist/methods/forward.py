"""Forward loss correction (Patrini, Rozza, Menon, Nock, Qu; CVPR 2017): docs/baselines.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nldist.data.stream import Batch
from nldist.dist.engine import Engine
from nldist.dist.table import Column
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.files import replacing
from nldist.methods.cross_entropy import cross_entropy
from nldist.models.network import Predictor
from nldist.passes.base import Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.method import Method, Phase
from nldist.passes.soft import soft_dtype
from nldist.passes.supervised import Step, SupervisedPass
from nldist.passes.sweep import Sweep

# Classes and samples that are turned round at a time: all of a line of the cache, of which few enough to stay there.
# The anchors of some of the classes are looked for at a time.
_COLUMNS, _ROWS, _CLASSES = 32, 1024, 8
TRANSITION_FILE = "transition.npy"


class Forward(Method):
    """A network whose predictions are led through the noise's transition matrix before they meet the labels.

    Without a given matrix another network is trained with cross-entropy first, whose predictions show the matrix.

    Attributes:
        transition: (C, C) on the device, T_ij = p(label j | class i); None until it is estimated.
    """

    def __init__(self, context: Context) -> None:
        self.settings = context.config.method.forward
        super().__init__(context)
        self.transition: Tensor | None = None
        if self.settings.transition is not None:
            matrix = read_transition(self.settings.transition, context.train.num_classes)
            self.transition = torch.from_numpy(matrix).float().to(context.world.device)

    def build_engines(self) -> list[Engine]:
        """The last one is the method's; one before it is for the estimate."""
        return [self.context.engine(number) for number in range(2 if self._estimate_epochs else 1)]

    @property
    def _estimate_epochs(self) -> int:
        return 0 if self.settings.transition is not None else self.settings.estimate_epochs

    def phases(self) -> list[Phase]:
        """Algorithm 1: the first training comes before the epochs of the run."""
        return [
            Phase("estimate", self._estimate_epochs, self._first),
            Phase("forward", self.context.recipe.epochs, self._second),
        ]

    def _first(self, epoch: int) -> list[Pass]:
        return [SupervisedPass(self.context, 0, self.engines[0], epoch, cross_entropy)]

    def _second(self, epoch: int) -> list[Pass]:
        number, epoch = len(self.engines) - 1, epoch - self._estimate_epochs
        train = SupervisedPass(self.context, number, self.engines[-1], epoch, self._loss)
        return [AnchorSweep(self), train] if number and epoch == 0 else [train]

    def _loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        (logits,) = engine.forward((step.images, "classify"))
        assert self.transition is not None
        return {"loss": forward_loss(logits, step.labels, self.transition)}

    def evaluation(self, epoch: int) -> list[Pass]:
        """None of the first network, which is not the method's."""
        return super().evaluation(epoch) if epoch >= self._estimate_epochs else []

    def weights(self) -> list[dict[str, Tensor]]:
        """See Method."""
        return super().weights()[-1:]

    def predictors(self) -> list[Predictor]:
        """See Method."""
        return super().predictors()[-1:]

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        return super().state_dict() | {"transition": self.transition}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        super().load_state_dict(state)
        if state["transition"] is not None:
            self.transition = state["transition"].to(self.context.world.device)


class AnchorSweep(Sweep):
    """The first network's predictions for all samples, and from them the transition matrix, kept in a file too."""

    def __init__(self, method: Forward) -> None:
        super().__init__(method.context, "anchors")
        self._method = method

    def start(self, num_steps: int, start_step: int) -> None:
        """See Pass."""
        table, world = self.context.table, self.context.world
        shape, dtype = (len(table.owned), self.context.train.num_classes), soft_dtype(self.context)
        rows = torch.zeros(shape, dtype=dtype, device=world.device)
        self.noisy = Column(rows, table.num_samples, world, 0)

    def resume_step(self, num_done: int) -> int | None:
        """Its rows, which nobody needs later, are in no checkpoint: it starts again."""
        return 0

    def see(self, batch: Batch, images: Tensor) -> None:
        """See Sweep."""
        self.noisy[batch.ids] = self._method.engines[0].evaluate(images, "classify")[0].softmax(1)

    def finish(self) -> Metrics:
        """See Pass."""
        context, method = self.context, self._method
        matrix = estimate_transition(self.noisy, method.settings.percentile, context.world)
        method.transition = torch.from_numpy(matrix).float().to(context.world.device)
        if context.world.is_main:
            context.directory.mkdir(parents=True, exist_ok=True)
            with replacing(context.directory / TRANSITION_FILE) as aside, aside.open("wb") as file:
                np.save(file, matrix)
        return {"transition_diagonal": float(matrix.diagonal().mean())}


def forward_loss(logits: Tensor, labels: Tensor, transition: Tensor) -> Tensor:
    """Mean of -log (T^t p)_y (Theorem 2), from logits (b, C), labels (b,) and T (C, C)."""
    columns = transition.clamp_min(torch.finfo(transition.dtype).tiny).log().T[labels].to(logits.dtype)
    return -(logits.log_softmax(1) + columns).logsumexp(1).mean()


def estimate_transition(noisy: Column, percentile: float, world: World) -> np.ndarray:
    """T_ij = p(label j | x_i) where x_i is class i's anchor (Theorem 3), float64 (C, C). A collective.

    Args:
        noisy: the predictions of a network that has learnt the noisy labels.
        percentile: an anchor is the sample surest of its class below this percentile; of all at 100.
        world: the ranks.
    """
    anchors = [
        anchor
        for columns in torch.split(noisy.rows, _COLUMNS, dim=1)
        for some in torch.split(_transposed(columns), _CLASSES)
        for anchor in _anchors(some.float().cpu().numpy(), noisy.owned.start, percentile, world)
    ]
    rows = noisy.fetch(torch.tensor(anchors, device=world.device)).cpu().double().numpy()
    return np.asarray(rows / rows.sum(1, keepdims=True))


def _transposed(columns: Tensor) -> Tensor:
    """Columns (owned, c) of a wide table, each contiguous: (c, owned)."""
    out = columns.new_empty(columns.shape[::-1])
    for rows, place in zip(torch.split(columns, _ROWS), torch.split(out, _ROWS, dim=1), strict=True):
        place.copy_(rows.T)
    return out


def _anchors(mine: np.ndarray, first: int, percentile: float, world: World) -> list[int]:
    """The anchors of some classes, whose probabilities (classes, owned) the samples from the `first` on have."""
    if percentile < 100:
        mine = np.where(mine < _percentile(mine, percentile, world)[:, None], mine, -1)
    places = mine.argmax(1) if mine.shape[1] else np.zeros(len(mine), np.int64)
    found = np.zeros((1, len(mine)), np.dtype([("value", np.float64), ("id", np.int64)]))
    found["value"] = mine[range(len(mine)), places] if mine.shape[1] else -np.inf
    found["id"] = first + places
    everyone = world.all_gather(found.view(np.int64)).view(found.dtype)
    best = everyone["value"].argmax(0)  # of the same values the first rank's, whose ids are smaller
    ids: list[int] = everyone["id"][best, range(len(mine))].tolist()
    return ids


def _percentile(mine: np.ndarray, percentile: float, world: World) -> np.ndarray:
    """Of rows that go over all ranks, here (classes, owned), as np.percentile(method="higher"): (classes,).

    It is among the greatest values of each rank, which are all that is sent.
    """
    num_samples = int(world.all_reduce(torch.tensor(mine.shape[1])))
    num_above = num_samples - int(np.percentile(np.arange(num_samples), percentile, method="higher"))
    greatest = np.full((1, len(mine), num_above), -1, np.float32)  # less than any probability
    num_mine = min(num_above, mine.shape[1])
    greatest[0, :, :num_mine] = np.partition(mine, mine.shape[1] - num_mine, axis=1)[:, mine.shape[1] - num_mine :]
    everyone = world.all_gather(greatest).swapaxes(0, 1).reshape(len(mine), -1)
    limit: np.ndarray = np.partition(everyone, -num_above, axis=1)[:, -num_above]
    return limit


def read_transition(path: Path, num_classes: int) -> np.ndarray:
    """A transition matrix (C, C) from an .npy file.

    Raises:
        UserError: there is none, or it is none.
    """
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"method.forward.transition={path} cannot be read as an .npy file: {error}") from error
    if matrix.shape != (num_classes, num_classes):
        shape, wanted = (" x ".join(map(str, s)) for s in (matrix.shape, (num_classes, num_classes)))
        raise UserError(f"{path} holds a matrix of {shape}; the data set's classes need {wanted}")
    if not (matrix >= 0).all() or not np.allclose(matrix.sum(1), 1, atol=1e-3):
        raise UserError(f"{path} is no transition matrix: row i holds p(label j | class i), all >= 0 and 1 in sum")
    return np.asarray(matrix, np.float64)
