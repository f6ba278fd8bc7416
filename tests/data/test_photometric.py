"""Every kernel against torchvision's operation on one image."""

import math
from collections.abc import Callable

import pytest
import torch
import torchvision.transforms.functional as tv1
import torchvision.transforms.v2.functional as tv
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms import RandAugment as TVRandAugment

from nldist.data.augment import photometric, policies
from nldist.data.augment.photometric import Kernel, apply_stages

FACTORS = [0.0, 0.05, 0.4, 0.95, 1.0, 1.3, 1.9]


def photo_patches(num: int, size: int) -> Tensor:
    """Squares of a photograph, and one of noise: uint8 (num, 3, size, size)."""
    photo = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)
    generator = torch.Generator().manual_seed(0)
    patches = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=generator)]
    for index in range(num - 1):
        top, left = 40 + 31 * index, 60 + 47 * index
        patches.append(photo[:, top : top + size, left : left + size].contiguous())
    return torch.stack(patches)


def compare(kernel: Kernel, reference: Callable[[Tensor, float], Tensor], magnitudes: list[float]) -> Tensor:
    """Absolute differences, each magnitude on an image of its own."""
    images = photo_patches(len(magnitudes), 24)
    ours = kernel(images, torch.tensor(magnitudes, dtype=torch.float64))
    theirs = torch.stack([reference(image, value) for image, value in zip(images, magnitudes, strict=True)])
    assert ours.dtype == torch.uint8
    return (ours.int() - theirs.int()).abs()


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        (photometric.brightness, tv.adjust_brightness),
        (photometric.contrast, tv.adjust_contrast),
        (photometric.saturation, tv.adjust_saturation),
        (photometric.sharpness, tv.adjust_sharpness),
    ],
)
def test_blends(kernel: Kernel, reference: Callable[[Tensor, float], Tensor]) -> None:
    difference = compare(kernel, reference, FACTORS)
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def test_hue() -> None:
    difference = compare(photometric.hue, tv.adjust_hue, [-0.5, -0.3, -0.1, 0.0, 0.1, 0.25, 0.5])
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize(
    ("kernel", "reference", "magnitudes"),
    [
        (
            photometric.posterize,
            lambda image, bits: tv.posterize(image, int(bits)),
            list(map(float, range(9))),
        ),
        (photometric.solarize, tv.solarize, [0.0, 1.0, 100.5, 128.0, 255.0]),
        (photometric.autocontrast, lambda image, _: tv.autocontrast(image), [0.0] * 4),
        (photometric.equalize, lambda image, _: tv.equalize(image), [0.0] * 4),
        (photometric.invert, lambda image, _: tv.invert(image), [0.0] * 3),
        (lambda images, _: photometric.greyscale(images), lambda image, _: tv.rgb_to_grayscale(image), [0.0] * 4),
    ],
)
def test_integer_operations_are_exact(
    kernel: Kernel, reference: Callable[[Tensor, float], Tensor], magnitudes: list[float]
) -> None:
    assert compare(kernel, reference, magnitudes).max() == 0


def test_images_of_few_colours() -> None:
    """Where a channel has one value only, or two, there is little to stretch or to flatten."""
    images = torch.zeros(4, 3, 20, 20, dtype=torch.uint8)
    images[1] = 255
    images[2, :, :7], images[2, 1, 7:] = 90, 91
    images[3, 0], images[3, 2] = 17, photo_patches(2, 20)[1, 0]
    unused = torch.zeros(4, dtype=torch.float64)
    for kernel, reference in ((photometric.autocontrast, tv.autocontrast), (photometric.equalize, tv.equalize)):
        assert torch.equal(kernel(images, unused), torch.stack([reference(image) for image in images]))


def test_blur() -> None:
    difference = compare(
        lambda images, sigmas: photometric.blur(images, sigmas, radius=2),
        lambda image, sigma: tv.gaussian_blur(image, [5, 5], [sigma, sigma]),
        [0.1, 0.5, 1.0, 2.0],
    )
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.001


def by_name(name: str) -> Kernel:
    kernel = policies.BANK[name]
    assert kernel is not None
    return kernel


def torchvision_affine(image: Tensor, translate: list[int], shear: list[float], center: list[int] | None) -> Tensor:
    moved: Tensor = tv1.affine(image, angle=0.0, translate=translate, scale=1.0, shear=shear, center=center)
    return moved


def torchvision_shear(image: Tensor, level: float, axis: int) -> Tensor:
    degrees = math.degrees(math.atan(level))
    return torchvision_affine(image, [0, 0], [degrees, 0.0] if axis == 0 else [0.0, degrees], [0, 0])


def torchvision_translate(image: Tensor, shift: float, axis: int) -> Tensor:
    return torchvision_affine(image, [int(shift), 0] if axis == 0 else [0, int(shift)], [0.0, 0.0], None)


@pytest.mark.parametrize(
    ("name", "reference", "magnitudes"),
    [
        ("rotate", tv1.rotate, [-30.0, -7.3, 0.0, 11.1, 26.0]),
        ("shear_x", lambda image, level: torchvision_shear(image, level, 0), [-0.3, -0.11, 0.0, 0.2]),
        ("shear_y", lambda image, level: torchvision_shear(image, level, 1), [-0.3, -0.11, 0.0, 0.2]),
        ("translate_x", lambda image, shift: torchvision_translate(image, shift, 0), [-9.0, 0.0, 1.0, 23.0]),
        ("translate_y", lambda image, shift: torchvision_translate(image, shift, 1), [-9.0, 0.0, 1.0, 23.0]),
    ],
)
def test_geometric_operations(name: str, reference: Callable[[Tensor, float], Tensor], magnitudes: list[float]) -> None:
    # Nearest neighbours: where a source place lies within rounding of half a pixel, either is right.
    assert (compare(by_name(name), reference, magnitudes) > 0).float().mean() < 0.005


def test_each_image_goes_through_its_own_stages() -> None:
    images = photo_patches(6, 16)
    kinds = torch.tensor([[0, 1], [1, 0], [2, 2], [0, 0], [1, 2], [2, 1]])
    magnitudes = torch.tensor([[0.5, 100], [100, 0.5], [0, 0], [0.2, 1.5], [30, 0], [0, 30]]).double()
    kernels = (photometric.brightness, photometric.solarize, None)
    before = images.clone()
    got = apply_stages(images, kinds, magnitudes, kernels)
    assert torch.equal(images, before)
    for index, image in enumerate(images):
        for kind, magnitude in zip(kinds[index], magnitudes[index], strict=True):
            kernel = kernels[kind]
            image = image if kernel is None else kernel(image[None], magnitude[None])[0]
        assert torch.equal(got[index], image)


def torchvision_name(name: str) -> str:
    spelt = {"autocontrast": "AutoContrast"}
    return spelt.get(name, "".join(part.capitalize() for part in name.split("_")))


def test_cifar10_policy_is_torchvisions() -> None:
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert len(policies.CIFAR10_POLICY) == len(theirs) == 25
    for ours, pair in zip(policies.CIFAR10_POLICY, theirs, strict=True):
        assert [(torchvision_name(name), p, m) for name, p, m in ours] == [(n, p, m or 0) for n, p, m in pair]


@pytest.mark.parametrize(("num_bins", "augmentation"), [(10, AutoAugment()), (31, TVRandAugment())])
def test_levels_are_torchvisions(num_bins: int, augmentation: AutoAugment | TVRandAugment) -> None:
    space = augmentation._augmentation_space(num_bins, (32, 48))
    for level in range(num_bins):
        ours = policies.level_ranges(level / (num_bins - 1), 32, 48)
        for name, (low, high) in ours.items():
            if torchvision_name(name) not in space or low == high == 0:
                continue
            values, signed = space[torchvision_name(name)]
            value = float(values[level]) if values.ndim else 0.0
            value = float(int(value)) if name.startswith("translate") else value
            middle = 1.0 if name in ("brightness", "color", "contrast", "sharpness") else 0.0
            expected = (middle - value, middle + value) if signed else (value, value)
            assert (low, high) == pytest.approx(expected, abs=1e-4), name
