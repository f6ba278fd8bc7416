"""SANM (Tu et al., CVPR 2023): the semi-supervised epoch with images masked where the network looks (docs/sanm.md)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nldist.data.draws import Draws, DrawSource
from nldist.data.stream import Batch
from nldist.errors import UserError
from nldist.methods.divide_pass import DividePass
from nldist.models import Network
from nldist.models.decoder import Decoder
from nldist.passes.base import Batches
from nldist.passes.context import Context

if TYPE_CHECKING:
    from nldist.methods.dividemix import DivideMix

_TRIES = 16  # draws of a rectangle's aspect, of which the first that fits into the image is taken
_ASPECTS = (0.8, 1.25)


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
        self._seen: list[Tensor] = []  # this network's feature maps of the guess views, in the order of its forwards
        # In this order: batch norm's running averages weigh the later forward more.
        targets_u = self._guess(views_u) if views_u else None
        targets_x = self._refine(labelled, views_x)
        groups = [self._masked(labelled, views_x, self._seen[-2], targets_x)]
        if targets_u is not None:
            groups.append(self._masked(unlabelled, views_u, self._seen[0], targets_u))
        rows, targets, peaks, troughs, whole = (torch.cat(part) for part in zip(*groups, strict=True))
        num_rows = len(groups[0][0])
        mixed, mixed_targets = self._mix(rows, targets, num_rows, step)
        calls = [(mixed, "classify"), (peaks, "reconstruct"), (troughs, "reconstruct")]
        logits, *restored = self.engine.forward(*calls)
        losses = self._losses(logits, mixed_targets, num_rows)
        losses["loss_rec"] = torch.stack([F.mse_loss(images, whole) for images in restored]).sum()
        return self._descend(losses, step, self._masking.lambda_rec * losses["loss_rec"])

    def _probabilities(self, images: Tensor, by: nn.Module | None = None) -> Tensor:
        """See DividePass; this network's feature maps are kept."""
        if by is not None:
            return super()._probabilities(images, by)
        logits, maps = self.engine.predict(images, "classify", "maps")
        self._seen.append(maps)
        return logits.softmax(1)

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


def saliency(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Where the network looks, in 256 steps: the squared feature map, as large as the image.

    Args:
        maps: (b, channels, h, w), of the last layer.
        size: height H and width W of the image.

    Returns:
        (b, H, W), whole numbers of 0 to 255.
    """
    squares = maps.square().sum(1, keepdim=True)
    large = F.interpolate(squares, tuple(size), mode="bilinear", align_corners=False)[:, 0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    return (255 * (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny)).floor()


def extremes(saliency: Tensor) -> tuple[Tensor, Tensor]:
    """The first places (row, column) of the greatest and of the least value, in raster order: int64 (b, 2) each."""
    flat, width = saliency.flatten(1), saliency.shape[2]
    places = (flat.argmax(1), flat.argmin(1))  # torch documents: the first of several
    peak, trough = (torch.stack([place // width, place % width], dim=1) for place in places)
    return peak, trough


def mask(images: Tensor, corner: Tensor, area: Tensor, draws: Draws) -> Tensor:
    """The images with a rectangle each (equation 5), filled with one drawn number in [0, 1) per channel.

    Args:
        images: (b, 3, H, W), normalised.
        corner: int64 (b, 2), row and column of the rectangle's top left corner; it is moved to lie within the image.
        area: (b,), of the rectangle as a share of the image's.
        draws: of its aspect, height to width, uniform in [0.8, 1.25), drawn again where it does not fit; and of the
            filling.

    Returns:
        (b, 3, H, W).
    """
    height, width = images.shape[-2:]
    sides = rectangle(area, draws.uniform(_TRIES), (height, width))
    filling = draws.uniform(images.shape[1]).to(images)[:, :, None, None]
    rows, columns = (_within(*axis) for axis in zip(corner.T, sides.T, (height, width), strict=True))
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], filling, images)


def _within(first: Tensor, length: Tensor, size: int) -> Tensor:
    """Which of `size` places are the `length` (b,) ones from `first` (b,) on, moved to lie within: bool (b, size)."""
    start, places = torch.minimum(first, size - length)[:, None], torch.arange(size, device=first.device)
    return (places >= start) & (places < start + length[:, None])


def rectangle(area: Tensor, draws: Tensor, size: Sequence[int]) -> Tensor:
    """Height and width in pixels, int64 (b, 2), by the first drawn aspect whose rectangle fits into the image.

    Where none does, as of an area near the whole image, it is cut off at the image's edge.

    Args:
        area: (b,), as a share of the image's.
        draws: (b, tries), uniform in [0, 1).
        size: of the image.
    """
    limits = torch.tensor(size, device=draws.device)
    aspect = _ASPECTS[0] + (_ASPECTS[1] - _ASPECTS[0]) * draws
    pixels = (area.double() * limits.prod())[:, None]
    sides = torch.stack([(pixels * aspect).sqrt(), (pixels / aspect).sqrt()], dim=2).round().long()
    first = (sides <= limits).all(2).int().argmax(1)  # 0 where none fits
    return sides[torch.arange(len(sides), device=draws.device), first].minimum(limits)


def lower(targets: Tensor, ratio: Tensor) -> Tensor:
    """Targets (b, C) of masked images (equation 7): the greatest entry loses `ratio` (b,) to all others alike."""
    num_classes, ratio = targets.shape[1], ratio.to(targets)[:, None]
    top = F.one_hot(targets.argmax(1), num_classes).bool()
    return torch.where(top, targets - ratio, targets + ratio / (num_classes - 1))


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
