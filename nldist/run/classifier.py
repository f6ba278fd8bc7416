"""A run's networks as one classifier."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nldist.config import Config
from nldist.data.manifest import sharded_resize
from nldist.data.stream import Batch
from nldist.data.views import View
from nldist.models.network import Network, Predictor
from nldist.run.directory import networks_of


class Classifier:
    """The networks of a weights file together, as the run evaluates them: its view, memory format and precision.

    Args:
        saved: what the file holds (`RunDirectory.load_weights`).
        config: of the run.
        device: where it computes.

    Attributes:
        classes: names of the C classes.
    """

    def __init__(self, saved: Mapping[str, Any], config: Config, device: torch.device) -> None:
        self.classes: list[str] = saved["classes"]
        self.view = View(config.views.eval, config.data.mean, config.data.std)
        self._format = torch.channels_last if config.model.channels_last else torch.contiguous_format
        self._device, self._autocast = device, config.train.autocast == "bf16"
        self._networks = [network.to(device).to(memory_format=self._format) for network in networks_of(saved)]

    def __call__(self, batch: Batch) -> Tensor:
        """The logits (b, C) of a batch of b > 0 images."""
        return self.logits(self.view(batch.images, batch.sizes, batch.draws, ()))

    def logits(self, images: Tensor) -> Tensor:
        """The sum of the networks' logits (b, C), float32, of images in the evaluation view (b, 3, h, w)."""
        images = images.contiguous(memory_format=self._format)
        return torch.stack([predict(images) for predict in self.predictors()]).sum(0)

    def predictors(self) -> list[Predictor]:
        """Each network's, in float32."""
        return [partial(self._logits, network) for network in self._networks]

    @torch.no_grad()
    def _logits(self, network: Network, images: Tensor) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            return network.logits(images.contiguous(memory_format=self._format)).float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """The softmax (b, C) of the mean of the networks' logits, of which `logits` (b, C) is the sum."""
        return (logits / len(self._networks)).softmax(1)


def resize_of(saved: Mapping[str, Any], config: Config) -> int | None:
    """To what short side (pixels) the images of a run were shrunk when they were sharded; None: not, or not known.

    The weights file says it, or, where an earlier nldist wrote it, the data set if it is there.
    """
    if "resize" not in saved:
        return sharded_resize(config.data.root, config.data.train_split)
    resize: int | None = saved["resize"]
    return resize
