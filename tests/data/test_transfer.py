from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nldist.data import transfer
from nldist.data.index import Index
from nldist.data.plan import Part
from nldist.data.stream import Batch, Stream
from tests.data.make import decode_id, id_image, make_dataset


def _render(id_: int) -> np.ndarray:
    """Ids in ascending order of size, so that later batches need larger buffers; every third is small."""
    return id_image(id_, *((4, 4) if id_ % 3 == 0 else (4 + id_ // 4, 20 + id_)))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.open(make_dataset(tmp_path_factory.mktemp("transfer") / "set", [240], render=_render), "train")


class _Pairs:
    """Two samples and nothing per step, forwards and then backwards."""

    num_steps = 240

    def step(self, k: int) -> dict[str, Part]:
        pair = k % 120 if k < 120 else 239 - k
        ids = np.array([2 * pair, 2 * pair + 1])
        return {"some": Part(ids, ids), "none": Part(ids[:0], ids[:0])}


def _check(batch: Batch) -> None:
    for id_, image, (height, width) in zip(batch.ids.tolist(), batch.images, batch.sizes.tolist(), strict=True):
        wanted = torch.from_numpy(_render(id_)).permute(2, 0, 1)
        assert decode_id(image.numpy()) == id_
        assert torch.equal(image[:, :height, :width], wanted)
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not transfer._mapped


@pytest.mark.parametrize("num_workers", [1, 2])
def test_buffers_are_used_again(index: Index, num_workers: int) -> None:
    for batches in Stream(index, None, _Pairs(), num_workers=num_workers):
        _check(batches["some"])
        assert len(batches["none"]) == 0
        num_buffers = len(transfer._mapped)
    # Each worker has those that wait (2 steps of 2 parts), one in the making and one that the consumer has.
    assert num_buffers <= 8 * num_workers


def test_what_the_consumer_holds_is_never_overwritten(index: Index) -> None:
    """All batches at once: more than there are buffers."""
    held = [batches["some"] for batches in Stream(index, None, _Pairs(), num_workers=1)]
    assert len(held) == 240
    for batch in held:
        _check(batch)


def test_a_view_of_a_batch_keeps_its_buffer(index: Index) -> None:
    views: list[tuple[int, Tensor]] = []
    for k, batches in enumerate(Stream(index, None, _Pairs(), num_workers=1)):
        if k % 20 == 0:
            views.append((int(batches["some"].ids[1]), batches["some"].images[1, :, :2]))
    del batches
    assert len(views) == 12
    for id_, view in views:
        assert decode_id(view.numpy()) == id_


def test_a_stream_left_early_lets_go_of_its_buffers(index: Index) -> None:
    for batches in Stream(index, None, _Pairs(), num_workers=2):
        first = batches["some"]
        break
    assert not transfer._mapped
    _check(first)


def test_two_streams_at_once(index: Index) -> None:
    streams = [Stream(index, None, _Pairs(), num_workers=1, start_step=start) for start in (0, 120)]
    for one, other in zip(*streams, strict=False):
        _check(one["some"])
        _check(other["some"])


def test_left_out_images_close_the_gap(tmp_path: Path) -> None:
    index = Index.open(make_dataset(tmp_path / "set", [240], render=_render), "train")
    with open(index.shards[0], "r+b") as tar:
        for id_ in (0, 3, 4, 5):  # the first of a pair, the last of a pair, and both of a pair
            tar.seek(index.offset[id_])
            tar.write(bytes(30))
    stream = Stream(index, None, _Pairs(), num_workers=2)
    parts = [batches["some"] for batches in stream]
    assert [part.ids.tolist() for part in parts[:4]] == [[1], [2], [], [6, 7]]
    for part in parts:
        _check(part)
    assert stream.num_bad == 8


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_on_a_gpu_are_those_on_the_cpu(index: Index, num_workers: int) -> None:
    stream = Stream(index, None, _Pairs(), num_workers=num_workers, device=torch.device("cuda"))
    for batches, wanted in zip(stream, Stream(index, None, _Pairs()), strict=True):
        for role, batch in batches.items():
            for one, other in zip(batch.tensors(), wanted[role].tensors(), strict=True):
                assert one.is_cuda
                assert torch.equal(one.cpu(), other)
