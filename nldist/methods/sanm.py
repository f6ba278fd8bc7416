"""SANM (Tu et al., CVPR 2023): the semi-supervised epoch with images masked where the network looks (docs/sanm.md)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.data.draws import DrawSource
from nldist.data.stream import Batch
from nldist.errors import UserError
from nldist.methods.divide_pass import DividePass
from nldist.methods.masks import extremes, lower, mask, saliency
from nldist.models import Network
from nldist.models.decoder import Decoder
from nldist.passes.base import Batches
from nldist.passes.context import Context

if TYPE_CHECKING:
    from nldist.methods.dividemix import DivideMix


class MaskedPass(DividePass):
    """DividePass with two masked copies of each image, at the peak and at the trough of its feature map.

    The noisier a label is held to be, the larger the mask (equation 2), and the less of the target stays (equation 7).
    The network also learns to restore what is masked (equation 10).
    """

    def __init__(self, method: "DivideMix", number: int, epoch: int) -> None:
        super().__init__(method, number, epoch)
        self._masking = method.context.config.method.sanm
        self._guess_view = self.context.named_view(self._masking.guess_view)
        self.num_rows = self.batch["labelled"] * ((12 if self._settings.form == "cifar" else 4) + 4)

    @classmethod
    def shape(cls, network: Network, context: Context) -> Network:
        """The network with a decoder for its last feature map."""
        side = _image_side(context)
        mode = network.training
        with torch.no_grad():
            (maps,) = network.eval()((torch.zeros(1, 3, side, side), "maps"))
        network.train(mode)
        return network.add("reconstruct", Decoder(maps.shape[1], maps.shape[2], side))

    def step(self, batches: Batches, step: int) -> Mapping[str, Tensor]:
        """One step: guess targets as DivideMix, mask, mix, descend."""
        labelled, unlabelled = batches["labelled"], batches["unlabelled"]
        views_x, views_u = (self._several(batch, "guess", self._guess_view) for batch in (labelled, unlabelled))
        # In this order: batch norm's running averages weigh the later forward more.
        own = self._own([*views_u, *views_x])
        groups = [self._masked(labelled, views_x, self._maps[-2], self._refine(labelled, own[-2:]))]
        if views_u:
            groups.append(self._masked(unlabelled, views_u, self._maps[0], self._guess(own[:2], views_u)))
        rows, targets, peaks, troughs, whole = (torch.cat(part) for part in zip(*groups, strict=True))
        num_rows = len(groups[0][0])
        mixed, mixed_targets = self._mix(rows, targets, num_rows, step)
        calls = [(mixed, "classify"), (peaks, "reconstruct"), (troughs, "reconstruct")]
        logits, *restored = self.engine.forward(*calls)
        losses = self._losses(logits, mixed_targets, num_rows)
        losses["loss_rec"] = torch.stack([F.mse_loss(images, whole) for images in restored]).sum()
        return self._descend(losses, step, self._masking.lambda_rec * losses["loss_rec"])

    def _own(self, views: list[Tensor]) -> list[Tensor]:
        """See DividePass; the feature maps of the views are kept."""
        outputs = self.engine.predict(*((view, "classify", "maps") for view in views))
        self._maps = outputs[1::2]
        return [logits.softmax(1) for logits in outputs[::2]]

    def _masked(self, batch: Batch, views: list[Tensor], maps: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Rows to be mixed and their targets; the first guess view masked at its peak, at its trough, and whole."""
        whole, masking = views[0], self._masking
        draws = DrawSource((self.context.seed(self.name, "mask"), self.epoch), batch.draws)
        clean = self._clean_on_device[batch.ids]
        ratio = draws.at(0).between(masking.ratio_low, masking.ratio_high) + masking.noise_ratio * (1 - clean)
        peak, trough = extremes(saliency(maps, whole.shape[-2:]))
        sources = (1, 2) if masking.separate_draws else (1, 1)
        copies = [
            mask(whole, place, masking.area * ratio, draws.at(number))
            for place, number in zip((peak, trough), sources, strict=True)
        ]
        lowered = lower(targets, ratio)
        # Of real data what is guessed from is what is trained on.
        if self._settings.form == "cifar":
            names = {"pair": masking.pair_view, "strong": masking.strong_view}
            views = [view for n, v in names.items() for view in self._several(batch, n, self.context.named_view(v))]
        rows, all_targets = torch.cat([*views, *copies]), torch.cat([targets] * len(views) + [lowered] * 2)
        return rows, all_targets, *copies, whole


def _image_side(context: Context) -> int:
    """The side of the images that the network is trained with."""
    sizes = torch.tensor([[int(context.train.height[0]), int(context.train.width[0])]])
    images = torch.zeros((1, 3, *sizes[0].tolist()), dtype=torch.uint8)
    view = context.named_view(context.config.method.sanm.guess_view)
    height, width = view(images, sizes, torch.zeros(1, dtype=torch.int64), (0,)).shape[-2:]
    if height != width:
        raise UserError(
            f"method.ssl=sanm restores square images, not {height} x {width}; let its views end in a square"
        )
    return int(height)
