"""What the pretext methods share: the network, the phase, two views of each image, and the k-NN measure."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from nldist.config import PretextSection
from nldist.data.plan import Plan
from nldist.data.stream import Batch
from nldist.dist.engine import Engine
from nldist.models import Network
from nldist.models.network import Projector
from nldist.passes.base import EnginePass, Pass
from nldist.passes.method import Method, Phase
from nldist.pretext.knn import knn_passes


class Pretext(Method):
    """A backbone with a projector, trained without labels; the given labels only measure it."""

    score = "knn_accuracy"
    uses_labels: ClassVar[bool] = False

    def build_engines(self) -> list[Engine]:
        """See Method."""
        return [self.context.engine(0, self._with_projector)]

    def _with_projector(self, network: Network) -> Network:
        return with_projector(network, self.settings.dim)

    @property
    def settings(self) -> PretextSection:
        """The stage's section of the configuration."""
        settings = self.context.config.pretext
        assert settings is not None
        return settings

    def phases(self) -> list[Phase]:
        """See Method."""
        return [Phase("pretext", self.context.recipe.epochs, lambda epoch: [self.train_pass(epoch)])]

    @abstractmethod
    def train_pass(self, epoch: int) -> Pass:
        """One epoch of training."""

    def evaluation(self, epoch: int) -> list[Pass]:
        """k-NN accuracy every `knn_every` epochs and at the end; what comes between is not measured."""
        last = epoch + 1 == self.context.recipe.epochs
        due = last or (epoch + 1) % self.settings.knn_every == 0
        return knn_passes(self.context, self.features, self.settings) if due else []

    def features(self, images: Tensor) -> Tensor:
        """Features (b, F) of the backbone in eval mode, no gradient."""
        return self.engines[0].evaluate(images, "features")[0]


def with_projector(network: Network, dim: int) -> Network:
    """The network with a projector to `dim` features in place of its classifying head."""
    return network.add("project", Projector(network.num_features, dim)).drop("classify")


class PretextPass(EnginePass):
    """One epoch over all images with two random views of each."""

    def __init__(self, method: Pretext, epoch: int) -> None:
        super().__init__(method.context, 0, method.engines[0], epoch)
        self.settings = method.settings
        self.batch = {"all": method.context.recipe.batch_size}
        self.num_samples, self.num_rows = len(self.context.train), 2 * self.batch["all"]

    def plan(self) -> Plan:
        """See Pass."""
        return self.context.shuffled(self.epoch, self.name, self.batch["all"])

    def views(self, batch: Batch) -> list[Tensor]:
        """Two independent views, (b, 3, h, w) each."""
        return [self.context.view(batch, self.epoch, name) for name in ("first", "second")]
