import math
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torchvision.transforms import autoaugment

from nldist.data.augment import sampling
from nldist.data.augment.frame import Op
from nldist.data.augment.spatial import Cutout, RandomResizedCrop, Resize, inverse_map
from nldist.data.draws import DrawSource
from nldist.data.views import View, ViewOp
from nldist.errors import UserError
from tests.data.test_photometric import photo_patches

KEY = (0, 1, 2)
RAW = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # gives the pixel values themselves

# Views that take images of several sizes, and views that want one.
RAGGED: dict[str, list[dict[str, Any]]] = {
    "pad_crop": [{"op": "pad_crop", "size": 24, "padding": 4}, {"op": "flip"}],
    "random_crop": [{"op": "flip"}, {"op": "random_crop", "size": 20}],
    "center_crop": [{"op": "center_crop", "size": 24}],
    "affine": [
        {"op": "affine", "degrees": 15, "translate": [0.1, 0.1], "scale": [0.67, 1.5], "shear": 5},
        {"op": "center_crop", "size": 24},
    ],
    "bilinear": [
        {"op": "affine", "degrees": 40, "scale": [0.5, 0.6], "interpolation": "bilinear"},
        {"op": "center_crop", "size": 24},
    ],
    "resize": [{"op": "resize", "size": 26}, {"op": "flip"}, {"op": "random_crop", "size": 22}],
    "random_resized_crop": [{"op": "random_resized_crop", "size": 16, "scale": [0.2, 1]}],
    "whole boxes": [
        {"op": "resize", "size": 23},
        {"op": "random_resized_crop", "size": 16, "scale": [1, 1], "ratio": [0.5, 2]},
    ],
    "resized twice": [{"op": "resize", "size": 20}, {"op": "random_resized_crop", "size": 16}],
    "simclr": [
        {"op": "random_resized_crop", "size": 20, "scale": [0.2, 1]},
        {"op": "flip"},
        {"op": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8},
        {"op": "greyscale", "p": 0.2},
        {"op": "blur", "p": 0.5},
    ],
    "rand_augment": [{"op": "random_crop", "size": 20}, {"op": "rand_augment"}, {"op": "cutout", "side": 8}],
    "auto_augment": [{"op": "center_crop", "size": 20}, {"op": "auto_augment_cifar10"}],
    "strong_ours": [{"op": "random_crop", "size": 20}, {"op": "strong_ours"}],
}


def view(ops: list[dict[str, Any]], stats: tuple[tuple[float, ...], tuple[float, ...]] = RAW) -> View:
    return View(TypeAdapter(list[ViewOp]).validate_python(ops), *stats)


def full_sizes(images: Tensor) -> Tensor:
    return torch.tensor(images.shape[2:]).expand(len(images), 2)


def ragged_batch(num: int = 40, fill: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Photographs of sizes 18 to 36, in the corner of a canvas whose rest is `fill`."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(18, 37, (num, 2), generator=generator)
    images = photo_patches(num % 10 + 1, 40).repeat(math.ceil(num / (num % 10 + 1)), 1, 1, 1)[:num]
    rows, columns = torch.arange(40)[:, None], torch.arange(40)
    outside = (rows >= sizes[:, :1, None]) | (columns >= sizes[:, 1:, None])
    return images.masked_fill(outside[:, None], fill), sizes, torch.arange(1000, 1000 + num)


def same_batch(num: int, size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    images = photo_patches(4, size).repeat(math.ceil(num / 4), 1, 1, 1)[:num]
    return images, full_sizes(images), torch.arange(num)


@pytest.mark.parametrize("name", RAGGED)
def test_padding_never_shows(name: str) -> None:
    images, sizes, draws = ragged_batch()
    painted = ragged_batch(fill=255)[0]
    assert torch.equal(view(RAGGED[name])(images, sizes, draws, KEY), view(RAGGED[name])(painted, sizes, draws, KEY))


@pytest.mark.parametrize("name", RAGGED)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    images, sizes, draws = ragged_batch()
    make = view(RAGGED[name])
    whole = make(images, sizes, draws, KEY)
    assert whole.dtype == torch.float32
    order = torch.randperm(len(images))
    assert torch.equal(make(images[order], sizes[order], draws[order], KEY), whole[order])
    part = torch.tensor([31, 2, 7])
    smaller = images[part][:, :, : int(sizes[part, 0].max()), : int(sizes[part, 1].max())]
    assert torch.equal(make(smaller, sizes[part], draws[part], KEY), whole[part])


@pytest.mark.parametrize("name", [name for name in RAGGED if name not in ("center_crop", "whole boxes")])
def test_key_and_draw_change_the_result(name: str) -> None:
    images, sizes, draws = ragged_batch()
    make = view(RAGGED[name])
    first = make(images, sizes, draws, KEY)
    for other in (make(images, sizes, draws, (0, 1, 3)), make(images, sizes, draws + 1000, KEY)):
        assert (first != other).flatten(1).any(1).float().mean() > 0.5


def test_normalisation() -> None:
    images, sizes, draws = same_batch(4)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = tv.normalize(images.float() / 255, list(mean), list(std))
    torch.testing.assert_close(view([], (mean, std))(images, sizes, draws, KEY), expected)


def test_an_empty_batch_stays_empty() -> None:
    images, sizes, draws = same_batch(0)
    for ops in ([], RAGGED["pad_crop"], RAGGED["simclr"], RAGGED["strong_ours"]):
        assert len(view(ops)(images, sizes, draws, KEY)) == 0


def test_pad_crop_gives_each_crop_of_the_padded_image_equally_often() -> None:
    image = torch.randint(1, 256, (1, 3, 6, 6), dtype=torch.uint8)
    num = 5000
    make = view([{"op": "pad_crop", "size": 6, "padding": 2}])
    crops = make(image.expand(num, -1, -1, -1), torch.full((num, 2), 6), torch.arange(num), KEY)
    padded = tv.pad(image[0], [2]).float()
    windows = padded.unfold(1, 6, 1).unfold(2, 6, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    hits = (crops[:, None] == windows[None]).flatten(2).all(2)
    assert hits.any(1).all()
    counts = hits.sum(0).double()
    assert ((counts - 200) ** 2 / 200).sum() < 60  # 24 degrees of freedom


@pytest.mark.parametrize("sides", [(40, 33), (33, 40), (32, 32), (20, 29), (31, 45)])
def test_center_crop(sides: tuple[int, int]) -> None:
    image = photo_patches(2, 48)[1:, :, : sides[0], : sides[1]]
    got = view([{"op": "center_crop", "size": 32}])(image, full_sizes(image), torch.zeros(1).long(), KEY)
    assert torch.equal(got, tv.center_crop(image, [32, 32]).float())


def test_a_crop_larger_than_the_image_is_padded_with_zeros() -> None:
    images, sizes, draws = same_batch(50, 20)
    got = view([{"op": "random_crop", "size": 30}])(images, sizes, draws, KEY)
    assert torch.equal(got.sum((2, 3)), images.float().sum((2, 3)))


def test_flip_mirrors_the_right_share() -> None:
    images, sizes, draws = same_batch(4000, 8)
    for ops in ([{"op": "flip", "p": 0.3}], [{"op": "center_crop", "size": 8}, {"op": "flip", "p": 0.3}]):
        got = view(ops)(images, sizes, draws, KEY)
        mirrored = (got == images.flip(3).float()).flatten(1).all(1)
        assert torch.equal(got[~mirrored], images[~mirrored].float())
        assert abs(mirrored.float().mean().item() - 0.3) < 0.03


@pytest.mark.parametrize("size", [24, 50])
def test_resize_and_crop_is_torchvisions(size: int) -> None:
    images, sizes, draws = ragged_batch(12)
    make = view([{"op": "resize", "size": size}, {"op": "center_crop", "size": size - 2}])
    got = make(images, sizes, draws, KEY)
    for image, (height, width), ours in zip(images, sizes.tolist(), got, strict=True):
        resized = tv.resize(image[:, :height, :width], [size], antialias=True)
        difference = (tv.center_crop(resized, [size - 2, size - 2]) - ours).abs()
        assert difference.max() <= 2
        assert difference.mean() < 0.3


def test_resize_alone_gives_images_of_one_shape() -> None:
    images = photo_patches(3, 40)[:, :, :30]
    got = view([{"op": "resize", "size": 20}])(images, full_sizes(images), torch.arange(3), KEY)
    expected = torch.stack([tv.resize(image, [20], antialias=True) for image in images])
    assert got.shape == (3, 3, 20, 26)
    assert (got - expected).abs().max() <= 2


def test_random_resized_crop_is_torchvisions() -> None:
    images, sizes, draws = ragged_batch(30)
    op = RandomResizedCrop(size=16, scale=(0.1, 1.0))
    got = View([op], *RAW)(images, sizes, draws, KEY)
    corners, shapes = op.boxes(sizes, DrawSource(KEY, draws).at(0))
    for index, ours in enumerate(got):
        top, left, height, width = *corners[index].tolist(), *shapes[index].tolist()
        expected = tv.resized_crop(images[index], top, left, height, width, [16, 16], antialias=True)
        assert (expected - ours).abs().max() <= 2


def test_boxes_of_random_resized_crop() -> None:
    num = 20_000
    sizes = torch.tensor([[256, 341]]).expand(num, 2)
    op = RandomResizedCrop(size=224, scale=(0.2, 0.6))
    corners, shapes = op.boxes(sizes, DrawSource((4,), torch.arange(num)).at(0))
    assert (corners >= 0).all()
    assert (corners + shapes <= sizes).all()
    share = shapes.double().prod(1) / (256 * 341)
    assert share.min() > 0.19
    assert share.max() < 0.61
    assert abs(share.mean().item() - 0.4) < 0.01  # the area is uniform, and every box fits
    log_ratio = (shapes[:, 1] / shapes[:, 0]).log()
    assert log_ratio.abs().max() < math.log(4 / 3) + 0.02
    assert abs(log_ratio.mean().item()) < 0.01
    middle = (corners / (sizes - shapes).clamp(min=1)).double().mean(0)
    assert (middle - 0.5).abs().max() < 0.02


@pytest.mark.parametrize(
    ("sides", "box", "corner"),
    [((10, 100), (10, 13), (0, 43)), ((90, 9), (12, 9), (39, 0)), ((8, 9), (8, 9), (0, 0))],
)
def test_random_resized_crop_falls_back_to_the_middle(
    sides: tuple[int, int], box: tuple[int, int], corner: tuple[int, int]
) -> None:
    # No box of 150 % of the area fits, so all ten tries fail.
    op = RandomResizedCrop(size=8, scale=(1.5, 1.5))
    corners, shapes = op.boxes(torch.tensor([sides]), DrawSource((0,), torch.tensor([5])).at(0))
    assert (tuple(shapes[0].tolist()), tuple(corners[0].tolist())) == (box, corner)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_affine_is_torchvisions(interpolation: sampling.Interpolation) -> None:
    images = photo_patches(5, 28)[:, :, :, :22]
    angle = torch.tensor([0.0, 15, -40, 90, 3], dtype=torch.float64)
    scale = torch.tensor([1.0, 0.67, 1.53, 1.13, 0.91], dtype=torch.float64)
    shear = torch.tensor([0.0, 5, -10, 0, 20], dtype=torch.float64)
    shift = torch.tensor([[3, -2], [0, 0], [1, 4], [0, 2], [-5, 0]])
    matrix = inverse_map(torch.deg2rad(angle), scale, torch.deg2rad(shear).tan())
    offset = -(matrix * shift[:, None]).sum(2)
    got = sampling.affine(images, full_sizes(images), matrix, offset, interpolation)
    for index, image in enumerate(images):
        expected = tv.affine(
            image,
            float(angle[index]),
            shift[index].tolist(),
            float(scale[index]),
            [float(shear[index]), 0.0],
            interpolation=tv.InterpolationMode(interpolation),
        )
        difference = (got[index].int() - expected.int()).abs()
        assert (difference > (0 if interpolation == "nearest" else 1)).float().mean() < 0.005


def test_affine_without_settings_changes_nothing() -> None:
    images, sizes, draws = same_batch(8)
    assert torch.equal(view([{"op": "affine"}])(images, sizes, draws, KEY), images.float())


def test_color_jitter_changes_the_right_share() -> None:
    images, sizes, draws = same_batch(64)
    kept = view([{"op": "color_jitter", "brightness": 0.4, "hue": 0.1, "p": 0.0}])(images, sizes, draws, KEY)
    assert torch.equal(kept, images.float())
    make = view([{"op": "color_jitter", "brightness": 0.9, "p": 0.5}])
    many, many_sizes, many_draws = same_batch(2000, 8)
    got = make(many, many_sizes, many_draws, KEY)
    ratio = got.mean((1, 2, 3)) / many.float().mean((1, 2, 3))
    unchanged = (got == many).flatten(1).all(1)
    assert abs(unchanged.float().mean().item() - 0.5) < 0.04
    assert 0.05 < ratio.min().item() < 0.2


def test_color_jitter_order_is_random() -> None:
    # Full red shows only where the brightness was raised, and not followed by a loss of saturation.
    pixels = torch.tensor([250, 10, 10], dtype=torch.uint8).view(1, 3, 1, 1).expand(400, 3, 4, 4)
    make = view([{"op": "color_jitter", "brightness": 0.5, "saturation": 0.9}])
    got = make(pixels, full_sizes(pixels), torch.arange(400), KEY)[:, :, 0, 0]
    clipped_last = (got[:, 0] == 255).float().mean()
    assert 0.1 < clipped_last < 0.6
    assert (got[:, 1] == got[:, 2]).all()


def test_greyscale_and_blur_rates() -> None:
    images, sizes, draws = same_batch(1000, 12)
    grey = view([{"op": "greyscale", "p": 0.2}])(images, sizes, draws, KEY)
    is_grey = (grey[:, 0] == grey[:, 1]).flatten(1).all(1)
    assert abs(is_grey.float().mean().item() - 0.2) < 0.05
    assert torch.equal(grey[is_grey], tv.rgb_to_grayscale(images[is_grey], 3).float())
    blurred = view([{"op": "blur", "sigma": [0.5, 2.0], "p": 0.5}])(images, sizes, draws, KEY)
    assert abs((blurred != images).flatten(1).any(1).float().mean().item() - 0.5) < 0.06


def test_rand_augment_applies_its_fourteen_operations_equally_often() -> None:
    image = photo_patches(1, 24).clamp(30, 220)  # autocontrast has something to do
    space = autoaugment.RandAugment()._augmentation_space(31, (24, 24))
    candidates, names = [], []
    for name, (levels, signed) in space.items():
        level = float(levels[21]) if levels.ndim else 0.0
        for sign in (-1, 1) if signed else (1,):
            made = autoaugment._apply_op(image[0], name, sign * level, tv.InterpolationMode.NEAREST, None)
            candidates.append(made.float())
            names.append(name)
    num = 1400
    make = view([{"op": "rand_augment", "num_ops": 1, "magnitude": 21}])
    results = make(image.expand(num, -1, -1, -1), torch.full((num, 2), 24), torch.arange(num), KEY)
    # Up to one level of rounding, and stray nearest neighbours.
    differs = ((results[:, None] - torch.stack(candidates)).abs() > 1).float().mean((2, 3, 4))
    assert differs.amin(1).max() < 0.01
    assert (differs < 0.01).sum(1).max() == 1
    chosen = differs.argmin(1).bincount(minlength=len(names))
    for name in space:
        counts = [int(count) for count, candidate in zip(chosen, names, strict=True) if candidate == name]
        assert 60 < sum(counts) < 145, name  # 100 expected, deviation 10
        assert min(counts) > 25, name


def test_auto_augment_runs_its_pairs() -> None:
    # On a black image only inversion shows.
    black = torch.zeros(4000, 3, 8, 8, dtype=torch.uint8)
    got = view([{"op": "auto_augment_cifar10"}])(black, full_sizes(black), torch.arange(4000), KEY)
    # Pairs 1 and 24 hold it, with probability 0.1; the contrast that may follow takes one level at most.
    white = (got >= 254).flatten(1).all(1)
    assert abs(white.float().mean().item() - 2 * 0.1 / 25) < 0.005
    assert (got[~white] == 0).all()


def hidden(ops: list[dict[str, Any]], num: int, size: int) -> Tensor:
    """Where a view of white images is zero: bool (num, size, size)."""
    white = torch.full((num, 3, size, size), 255, dtype=torch.uint8)
    stats = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    got = view(ops, stats)(white, full_sizes(white), torch.arange(num), KEY)
    assert ((got == 0) | (got == 2)).all()
    return (got == 0).all(1)


def test_cutout_blanks_one_square_behind_the_normalisation() -> None:
    holes = hidden([{"op": "cutout", "side": 6}], 2000, 20)
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), rows * columns)
    assert rows.max() == columns.max() == 6
    assert rows.min() == columns.min() == 3  # clipped at the border
    per_pixel = holes.float().mean(0)
    assert abs(per_pixel[5:15, 5:15].mean().item() - 36 / 400) < 0.01


def test_cutout_sides_are_uniform_in_their_range() -> None:
    inside = hidden([{"op": "cutout", "side": [1, 4]}], 4000, 40)[:, 4:36, 4:36]
    whole = inside[inside[:, 0].any(1).logical_not() & inside[:, :, 0].any(1).logical_not()]
    areas = whole.sum((1, 2))
    squares = [(areas == side * side).float().mean().item() for side in (1, 2, 3, 4)]
    assert min(squares) > 0.08
    assert max(squares) < 0.25


def test_strong_ours_ends_with_a_cutout_of_its_range() -> None:
    images, sizes, draws = same_batch(300)
    stats = ((0.4914, 0.4822, 0.4465), (0.2, 0.2, 0.2))  # no pixel is zero by itself
    got = view([{"op": "strong_ours"}], stats)(images, sizes, draws, KEY)
    holes = (got == 0).all(1)
    assert 100 < holes.sum((1, 2)).max() <= 256
    images, sizes, draws = same_batch(300)
    got = view([{"op": "strong_ours", "cutout": [1, 4]}], stats)(images, sizes, draws, KEY)
    holes = (got == 0).all(1)
    border = torch.ones(holes.shape[1:], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    whole = holes[(holes & border).any((1, 2)).logical_not()]
    # Lengths of 1 to 4 blank 2 * floor(L / 2) pixels a side: none, 2, 2, 4.
    assert set(whole.sum((1, 2)).tolist()) == {0, 4, 16}
    kept = view([{"op": "strong_ours", "num_ops": 1, "cutout": [1, 1]}])(images, sizes, draws, KEY)
    unchanged = ((kept != images).any(1).sum((1, 2)) <= 1).float().mean().item()
    assert 1 / 14 - 0.05 < unchanged < 0.25  # identity, and operations that chance to change nothing


def test_nothing_may_follow_an_op_that_blanks() -> None:
    with pytest.raises(UserError, match=r"cutout.*last"):
        view([{"op": "cutout", "side": 4}, {"op": "flip"}])


@pytest.mark.parametrize("op", [{"op": "color_jitter", "hue": 0.1}, {"op": "rand_augment"}, {"op": "blur", "p": 0.5}])
def test_images_of_several_sizes_are_refused_where_one_is_needed(op: dict[str, Any]) -> None:
    images, sizes, draws = ragged_batch()
    with pytest.raises(UserError, match=rf"several sizes reach {op['op']}.*center_crop"):
        view([op, {"op": "center_crop", "size": 8}])(images, sizes, draws, KEY)
    with pytest.raises(UserError, match="several sizes"):
        view([{"op": "resize", "size": 8}])(images, sizes, draws, KEY)


@pytest.mark.parametrize(
    "op",
    [
        {"op": "pad_crop", "size": 32},
        {"op": "flip", "probability": 0.5},
        {"op": "spin"},
        {"op": "random_resized_crop", "size": 8, "scale": [1.0, 0.2]},
        {"op": "cutout", "side": [0, 4]},
        {"op": "rand_augment", "magnitude": 11, "num_bins": 11},
        {"size": 32},
    ],
)
def test_bad_settings_are_refused(op: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(list[ViewOp]).validate_python([op])


def test_every_setting_is_described() -> None:
    for kind in Op.__subclasses__():
        undescribed = [name for name, field in kind.model_fields.items() if name != "op" and not field.description]
        assert not undescribed, kind
    assert Cutout(side=3).op == "cutout"
    assert Resize(size=8).op == "resize"


@pytest.mark.gpu
@pytest.mark.parametrize("name", RAGGED)
def test_same_view_on_a_gpu(name: str) -> None:
    images, sizes, draws = ragged_batch()
    make = view(RAGGED[name])
    on_gpu = make(images.cuda(), sizes.cuda(), draws.cuda(), KEY).cpu()
    difference = (on_gpu - make(images, sizes, draws, KEY)).abs()
    assert (difference > 2).float().mean() < 0.002
