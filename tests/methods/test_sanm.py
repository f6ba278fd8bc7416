"""SANM's equations against plain NumPy, its step, and runs of it (our own references)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.config.file import load_config
from nldist.data.draws import DrawSource
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.methods.dividemix import DivideMix
from nldist.methods.masks import extremes, lower, mask, rectangle, saliency
from nldist.models.decoder import Decoder
from tests.contexts import open_context, task_of
from tests.jobs import DIGITS, output, run_job
from tests.test_train import assert_same_weights, epoch_records

SETTINGS = ("method.ssl=sanm", "train.epochs=4", "method.dividemix.warmup_epochs=2", "train.batch_size=32")
SHORT = (*SETTINGS, "train.epochs=3", "train.checkpoint_every_steps=5", "method.dividemix.rampup_epochs=2")


def build(digits: Path, *overrides: str, world: World | None = None) -> DivideMix:
    return DivideMix(open_context(load_config(DIGITS, [f"data.root={digits}", *SETTINGS, *overrides]), world))


def draws(count: int, seed: int = 0) -> DrawSource:
    return DrawSource((seed,), torch.arange(count))


def test_saliency_is_the_squared_map_as_large_as_the_image_in_256_steps() -> None:
    maps = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    got = saliency(maps, (8, 8)).numpy()
    squares = (maps.numpy() ** 2).sum(1)
    for image, square in zip(got, squares, strict=True):
        places = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3)
        low = np.floor(places).astype(int)
        high, share = np.minimum(low + 1, 3), places - low
        rows = square[low] * (1 - share)[:, None] + square[high] * share[:, None]
        large = rows[:, low] * (1 - share) + rows[:, high] * share
        scaled = 255 * (large - large.min()) / (large.max() - large.min())
        assert np.abs(image - np.floor(scaled)).max() <= 1, "a float32 may fall on the other side of a step"
        assert (image == np.floor(scaled)).mean() > 0.9
    assert (saliency(torch.ones(1, 2, 4, 4), (8, 8)) == 0).all(), "a flat map has no peak, and no NaN"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_peak_does_not_depend_on_how_the_processor_rounds(dtype: torch.dtype) -> None:
    maps = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=dtype)
    for (row, column), place in {(0, 0): [0, 0], (0, 3): [0, 28], (3, 0): [28, 0], (3, 3): [28, 28]}.items():
        greatest = maps.clone()
        greatest[:, :, row, column] += 1  # the plateau that 32 pixels make of it begins at `place`
        peak, _ = extremes(saliency(greatest, (32, 32)))
        assert (peak == torch.tensor(place)).all()


def test_peak_and_trough_are_the_first_in_raster_order() -> None:
    values = torch.tensor([[[1.0, 9.0, 9.0], [0.0, 9.0, 0.0]]])
    peak, trough = extremes(values)
    assert (peak.tolist(), trough.tolist()) == ([[0, 1]], [[1, 0]])


def test_a_rectangle_is_the_first_drawn_that_fits() -> None:
    area = torch.tensor([0.02, 0.2, 0.9, 0.9, 1.0])
    uniform = torch.tensor([[0.5, 0.1], [1.0, 0.0], [0.0, 0.45], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    got = rectangle(area, uniform, (20, 30)).numpy()
    for sides, share, row in zip(got, area.tolist(), uniform.tolist(), strict=True):
        pixels, chosen = share * 600, None
        for number in row:
            aspect = 0.8 + 0.45 * number
            height, width = round(np.sqrt(pixels * aspect)), round(np.sqrt(pixels / aspect))
            if height <= 20 and width <= 30:
                chosen = (height, width)
                break
            last = (min(height, 20), min(width, 30))
        assert tuple(sides) == (chosen or last) if chosen else True
    assert got[4, 0] == 20, "an area near the whole image is cut off at its edge"


def test_masked_images_against_a_loop() -> None:
    images = torch.randn(40, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    corner = torch.stack([torch.arange(40) % 12, torch.arange(40) % 10], dim=1)
    area = torch.linspace(0, 1, 40)
    got = mask(images, corner, area, draws(40).at(1))
    stream = draws(40).at(1)
    sides, filling = rectangle(area, stream.uniform(16), (12, 10)), stream.uniform(3)
    for i in range(40):
        expected = images[i].clone()
        (top, left), (height, width) = corner[i].tolist(), sides[i].tolist()
        top, left = min(top, 12 - height), min(left, 10 - width)
        for channel in range(3):
            expected[channel, top : top + height, left : left + width] = float(filling[i, channel])
        torch.testing.assert_close(got[i], expected)
    assert torch.equal(got[0], images[0]), "no area, no mask"
    whole = mask(images[:1], corner[:1] * 0, torch.tensor([2.0]), draws(1).at(1))
    assert (whole == whole[:, :, :1, :1]).all(), "a mask of the whole image"


@pytest.mark.parametrize("ratio", [0.0, 0.05, 1.0])
def test_the_target_of_a_masked_image_keeps_its_sum(ratio: float) -> None:
    targets = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    got = lower(targets, torch.tensor([ratio, ratio])).numpy()
    for row, target in zip(got, targets.numpy(), strict=True):
        for c in range(3):
            assert row[c] == pytest.approx(target[c] - ratio if c == target.argmax() else target[c] + ratio / 2)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(("channels", "maps", "image"), [(512, 4, 32), (2048, 7, 224), (64, 2, 8), (10, 3, 32)])
def test_the_decoder_gives_an_image(channels: int, maps: int, image: int) -> None:
    decoder = Decoder(channels, maps, image)
    assert decoder(torch.zeros(2, channels, maps, maps)).shape == (2, 3, image, image)
    if channels == 512:  # of the authors' networks: 3.3 and 19.0 million parameters
        assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == 3.3
    if channels == 2048:
        assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == 19.0


def one_step(digits: Path, *overrides: str) -> dict[str, Any]:
    """The first step of network 0 on a given division, and what its one forward was asked for."""
    method = build(digits, "method.sanm.ratio_low=0.1", "method.sanm.ratio_high=0.3", *overrides)
    clean = (np.arange(1437) % 4).astype(np.float32) / 3
    method.context.table["clean1"].numpy()[:] = clean
    task = task_of(method, 2, "net0")
    plan = task.plan()
    task.start(plan.num_steps, 0)
    batches = next(iter(method.context.stream("train", plan)))
    calls: list[Any] = []
    forward = task.engine.forward

    def watched(*asked: Any, **options: Any) -> Any:
        calls.extend(asked)
        return forward(*asked, **options)

    task.engine.forward = watched
    values = {name: float(value) for name, value in task.step(batches, 0).items()}
    return {"task": task, "batches": batches, "calls": calls, "values": values, "clean": clean}


@pytest.mark.parametrize(("form", "per_image"), [("cifar", 6), ("real", 4)])
def test_a_step_mixes_masked_and_whole_rows_and_restores_the_masked(form: str, per_image: int, digits: Path) -> None:
    found = one_step(digits, f"method.dividemix.form={form}")
    (mixed, *_), (peaks, head, *_), (troughs, *_) = found["calls"]
    num_x, num_u = (len(found["batches"][role]) for role in ("labelled", "unlabelled"))
    assert head == "reconstruct"
    assert len(mixed) == per_image * (num_x + (num_u if form == "cifar" else 0))
    assert len(peaks) == len(troughs) == num_x + num_u
    assert ("loss_u" in found["values"]) == (form == "cifar")
    # Peak and trough copies differ from one another in two rectangles of one size.
    differ = (peaks != troughs).any(1).flatten(1).sum(1)
    assert (differ > 0).float().mean() > 0.9
    clean = torch.from_numpy(found["clean"])[torch.cat([b.ids for b in found["batches"].values()])]
    assert differ[clean < 0.5].float().mean() >= differ[clean > 0.9].float().mean()
    assert found["values"]["loss_rec"] > 0


def test_views_that_a_step_needs_are_asked_for_before_it(digits: Path) -> None:
    with pytest.raises(UserError, match=r"method\.sanm\.strong_view=sharp, but views has no sharp"):
        load_config(DIGITS, ["method.ssl=sanm", "method.sanm.strong_view=sharp"])
    with pytest.raises(UserError, match=r"method\.ssl=sanm is for dividemix and scanmix, not mixup"):
        load_config(DIGITS, ["method.ssl=sanm", "method.name=mixup"])


def test_killed_within_an_epoch_and_resumed_it_ends_with_the_same_weights(few_digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={few_digits}", *SHORT, "train.checkpoint_every_steps=3")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_job(whole, *arguments, world_size=2) == [0, 0]
    assert run_job(cut, *arguments, world_size=2, kill=(1, 36))[1] == -9
    assert run_job(cut, *arguments, world_size=2) == [0, 0]
    assert "resumed from e0002" in output(cut)
    assert_same_weights(whole, cut)
    assert epoch_records(whole) == epoch_records(cut)
    weights: list[dict[str, Tensor]] = torch.load(whole / "weights" / "last.pt", weights_only=True)["networks"]
    assert not [name for name in weights[0] if name.startswith("decoder")], "a plain classifier"


def test_the_reconstruction_is_the_mean_square_over_both_copies(digits: Path) -> None:
    found = one_step(digits)
    _, (peaks, *_), (troughs, *_) = found["calls"]
    task = found["task"]
    views = [task._several(found["batches"][role], "guess", task._guess_view)[0] for role in ("labelled", "unlabelled")]
    whole = torch.cat(views)
    assert peaks.shape == whole.shape
    assert ((peaks == whole) | (troughs == whole)).float().mean() > 0.7, "the masks are small"
    assert F.mse_loss(peaks, whole) > 0


def test_deepspeed_trains_the_decoder_too(few_digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={few_digits}", *SHORT, "engine.name=deepspeed", "engine.zero_stage=1")
    assert run_job(tmp_path / "run", *arguments, world_size=2) == [0, 0]
    losses = [record["net1/loss_rec"] for record in epoch_records(tmp_path / "run") if "net1/loss_rec" in record]
    assert len(losses) == 1
    assert np.isfinite(losses[0])
