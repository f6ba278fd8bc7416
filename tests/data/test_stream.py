import io
import multiprocessing
import os
import pickle
import time
import zlib
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize

from nldist.data.decoded import decoded_cache
from nldist.data.index import Index
from nldist.data.plan import Part, Plan, divided, shuffled, sweep
from nldist.data.stream import Batch, Stream
from nldist.errors import UserError
from tests.data.make import decode_id, label_of, make_dataset

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SHARD_SIZES = [3, 0, 40, 1, 90, 17]
NUM = sum(SHARD_SIZES)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return Index.open(make_dataset(tmp_path_factory.mktemp("stream") / "set", SHARD_SIZES), "train")


@pytest.fixture
def damaged(tmp_path: Path) -> Index:
    """A data set of its own, to be damaged."""
    return Index.open(make_dataset(tmp_path / "set", SHARD_SIZES), "train")


def _plan(batch_size: int = 16, epoch: int = 0) -> Plan:
    return shuffled(NUM, rank=0, size=1, batch_size=batch_size, seed=0, epoch=epoch, window=30)


def _check(batch: Batch, part: Part) -> None:
    """The batch holds the part's samples, in its order, with their own images and labels."""
    assert torch.equal(batch.ids, torch.from_numpy(part.ids))
    assert torch.equal(batch.draws, torch.from_numpy(part.draws))
    assert torch.equal(batch.labels, torch.from_numpy(label_of(part.ids)).long())
    assert [decode_id(image.numpy()) for image in batch.images] == part.ids.tolist()
    assert batch.images.shape[1:] == (3, 6, 8)
    assert (batch.sizes == torch.tensor([6, 8])).all()


@pytest.mark.parametrize("num_workers", [0, 1, 3, 20])
def test_batches_follow_the_plan(index: Index, num_workers: int) -> None:
    plan = _plan()
    stream = Stream(index, None, plan, num_workers=num_workers)
    batches = list(stream)
    assert len(batches) == len(stream) == plan.num_steps
    for k, batch in enumerate(batches):
        _check(batch["all"], plan.step(k)["all"])
    assert stream.num_images == NUM
    assert stream.num_bad == 0
    assert stream.wait_seconds > 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_roles_and_repeated_samples(index: Index, num_workers: int) -> None:
    ids = np.arange(NUM)
    args = {"rank": 0, "size": 1, "batch_size": 16, "seed": 0, "epoch": 0}
    plan = divided(NUM, ids[:140], ids[140:], **args, window=None)  # type: ignore[arg-type]
    for k, batches in enumerate(Stream(index, None, plan, num_workers=num_workers)):
        assert list(batches) == ["labelled", "unlabelled"]
        for role, part in plan.step(k).items():
            _check(batches[role], part)
    assert (plan.step(plan.num_steps - 1)["unlabelled"].draws >= NUM).all()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [1, 4, 9, 10])
def test_resuming_at_a_step_gives_the_rest(index: Index, start: int, num_workers: int) -> None:
    plan = _plan()
    assert plan.num_steps == 10
    whole = list(Stream(index, None, plan))
    rest = list(Stream(index, None, plan, start_step=start, num_workers=num_workers))
    assert len(rest) == 10 - start
    for one, other in zip(whole[start:], rest, strict=True):
        assert all(map(torch.equal, one["all"].tensors(), other["all"].tensors()))


def test_epochs_repeat_exactly_and_differ_from_each_other(index: Index) -> None:
    first, again, other = (
        torch.cat([b["all"].images for b in Stream(index, None, _plan(epoch=epoch), num_workers=2)])
        for epoch in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_stream_leaves_the_global_random_state_alone(index: Index) -> None:
    before = torch.get_rng_state()
    for num_workers in (0, 2):
        list(Stream(index, None, _plan(), num_workers=num_workers))
    assert torch.equal(before, torch.get_rng_state())


def test_other_labels(index: Index) -> None:
    labels = np.arange(NUM)[::-1]
    for batches in Stream(index, labels, _plan()):
        assert torch.equal(batches["all"].labels, NUM - 1 - batches["all"].ids)


def test_an_empty_part_and_an_empty_plan(index: Index) -> None:
    plan = sweep(NUM, rank=0, size=1, batch_size=8, population=np.empty(0, np.int64))
    assert list(Stream(index, None, plan, num_workers=2)) == []
    plan = sweep(NUM, rank=1, size=2, batch_size=8, population=np.array([0, 1]))
    (batches,) = Stream(index, None, plan, num_workers=2)
    assert len(batches["all"]) == 0
    assert batches["all"].images.shape == (0, 3, 1, 1)
    assert batches["all"].sizes.shape == (0, 2)


def _photo(id_: int) -> np.ndarray:
    """Smooth colours of a size of its own."""
    height, width = [(40, 30), (300, 200), (64, 500), (33, 97)][id_ % 4]
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x % 256, y * 3 % 256, (x + y + 40 * id_) % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("image_format", ["jpg", "webp", "png"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_of_different_sizes(tmp_path: Path, image_format: str, num_workers: int) -> None:
    """Against torchvision: padding with zeros, and the longer side reduced to `max_side`."""
    root = make_dataset(tmp_path / "set", [5, 3], render=_photo, image_format=image_format)
    index = Index.open(root, "train")
    plan = sweep(8, rank=0, size=1, batch_size=8)
    (batches,) = Stream(index, None, plan, max_side=250, num_workers=num_workers)
    batch = batches["all"]
    assert batch.sizes.tolist() == [[40, 30], [250, 167], [32, 250], [33, 97]] * 2
    assert batch.images.shape == (8, 3, 250, 250)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    _check_pixels(batch, index)


def _check_pixels(batch: Batch, index: Index) -> None:
    """Each image's are torchvision's, and zeros are beside it."""
    for id_, image, (height, width) in zip(batch.ids.tolist(), batch.images, batch.sizes.tolist(), strict=True):
        with open(index.shards[index.shard[id_]], "rb") as tar:
            tar.seek(index.offset[id_])
            data = np.frombuffer(tar.read(index.size[id_]), np.uint8).copy()
        wanted = decode_image(torch.from_numpy(data), ImageReadMode.RGB)
        if wanted.shape[1:] != (height, width):
            wanted = resize(wanted, [height, width], antialias=True)
        assert torch.equal(image[:, :height, :width], wanted)
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()


def _wide_low_or_narrow(id_: int) -> np.ndarray:
    height, width = [(40, 97), (20, 97), (40, 30), (33, 60)][id_ % 4]
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(x * 2 + 9 * id_) % 256, y * 5, (x + y + 40 * id_) % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kept", [False, True])
def test_images_as_wide_as_their_batch_lie_in_their_own_places(tmp_path: Path, num_workers: int, kept: bool) -> None:
    """They are decoded there; in memory that other batches have used, and beside images that are copied."""
    root = make_dataset(tmp_path / "set", [20, 23], render=_wide_low_or_narrow, image_format="jpg")
    index = Index.open(root, "train")
    decoded = decoded_cache(index, 512, tmp_path / "kept", 2**30) if kept else None
    for epoch in range(2):
        plan = shuffled(43, rank=0, size=1, batch_size=3, seed=0, epoch=epoch, window=None)
        for batches in Stream(index, None, plan, num_workers=num_workers, decoded=decoded):
            _check_pixels(batches["all"], index)


def test_images_with_an_orientation_tag_are_turned(tmp_path: Path) -> None:
    index = Index.open(make_dataset(tmp_path / "set", [4], image_format="jpg"), "train")
    upright = Image.fromarray(_photo(0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    out = io.BytesIO()
    upright.rotate(90, expand=True).save(out, "JPEG", quality=95, exif=exif)
    image = decode_image(torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8), apply_exif_orientation=True)
    assert image.shape == (3, 40, 30)
    _overwrite(index, 2, out.getvalue(), height=40, width=30)
    (batches,) = Stream(index, None, sweep(4, rank=0, size=1, batch_size=4))
    assert torch.equal(batches["all"].images[2, :, :40, :30], image)


def test_png_files_of_16_bits_are_scaled_not_wrapped(damaged: Index) -> None:
    grey = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1390
    out = io.BytesIO()
    Image.fromarray(grey).save(out, "PNG")
    _overwrite(damaged, 1, out.getvalue(), height=6, width=8)
    (batches,) = Stream(damaged, None, sweep(NUM, rank=0, size=1, batch_size=NUM))
    wanted = torch.from_numpy(grey.astype(np.float64) / 257)
    assert (batches["all"].images[1] - wanted).abs().max() < 1


def _overwrite(index: Index, id_: int, data: bytes, **facts: int) -> None:
    """Replace an image's bytes at their place in the tar, or with `facts` behind its end and in the index."""
    path = Path(index.shards[index.shard[id_]])
    offset = path.stat().st_size if facts else int(index.offset[id_])
    with open(path, "r+b") as tar:
        tar.seek(offset)
        tar.write(data)
    if facts:
        records = np.array(index.records)
        for name, value in (facts | {"offset": offset, "size": len(data), "crc32": zlib.crc32(data)}).items():
            records[name][id_] = value
        index.records = records


def test_a_flipped_byte_in_a_png_is_a_bad_record_and_not_a_crash(damaged: Index) -> None:
    """torchvision's decoder ends the process on some of these."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(out, "PNG")
    _overwrite(damaged, 1, out.getvalue(), height=6, width=8)
    path, offset = Path(damaged.shards[damaged.shard[1]]), int(damaged.offset[1])
    for place in range(8, len(out.getvalue()), 7):
        flipped = bytearray(out.getvalue())
        flipped[place] ^= 0x55
        with open(path, "r+b") as tar:
            tar.seek(offset)
            tar.write(flipped)
        stream = Stream(damaged, None, sweep(NUM, rank=0, size=1, batch_size=NUM))
        assert [len(batches["all"]) for batches in stream] == [NUM - 1]
        assert stream.first_bad is not None
        assert "CRC-32" in stream.first_bad


def _damage(index: Index, id_: int) -> None:
    _overwrite(index, id_, b"\x00" * 40)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_records_are_left_out_and_reported(
    damaged: Index, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    for id_ in (4, 60, 61):
        _damage(damaged, id_)
    plan = sweep(NUM, rank=0, size=1, batch_size=16)
    stream = Stream(damaged, None, plan, num_workers=num_workers)
    parts = [batches["all"] for batches in stream]
    assert torch.cat([part.ids for part in parts]).tolist() == [i for i in range(NUM) if i not in (4, 60, 61)]
    for part in parts:
        _check(part, Part(part.ids.numpy(), part.ids.numpy()))
    assert (stream.num_bad, stream.num_images) == (3, NUM - 3)
    shard = damaged.shards[2]
    wanted = f"image 4 (part2/image00004) in {shard} at byte {damaged.offset[4]}: its bytes are not those"
    assert stream.first_bad is not None
    assert stream.first_bad.startswith(wanted)
    assert [record.message for record in caplog.records] == [f"left out: {stream.first_bad}"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_records_are_refused_on_request(damaged: Index, num_workers: int) -> None:
    _damage(damaged, 60)
    stream = Stream(damaged, None, sweep(NUM, rank=0, size=1, batch_size=16), num_workers=num_workers, on_bad="refuse")
    with pytest.raises(UserError, match=r"^image 60 \(part4/image00060\) in .*4\.tar at byte \d+: .*CRC-32") as error:
        list(stream)
    assert "Traceback" not in str(error.value)
    assert not _workers()


def test_what_is_wrong_with_a_record_is_told_apart(damaged: Index) -> None:
    plan = sweep(NUM, rank=0, size=1, batch_size=NUM)

    def reason() -> str:
        stream = Stream(damaged, None, plan)
        list(stream)
        assert stream.first_bad is not None
        return stream.first_bad

    records = np.array(damaged.records)
    damaged.records = records
    records["height"][5] = 9
    assert "(6, 8) pixels (height, width), the index says (9, 8)" in reason()
    records["height"][5] = 6
    data = b"not an image"
    _overwrite(damaged, 5, data, crc32=zlib.crc32(data))
    assert "cannot be decoded" in reason()
    os.truncate(damaged.shards[2], int(damaged.offset[3]) + 10)
    assert "image 3" in reason()
    assert "shard was cut short" in reason()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_missing_shard_is_always_an_error(damaged: Index, num_workers: int) -> None:
    os.unlink(damaged.shards[4])
    with pytest.raises(UserError, match=r"^shard .*train-000004\.tar: No such file or directory$"):
        list(Stream(damaged, None, _plan(), num_workers=num_workers))


class _FailingPlan:
    num_steps = 5

    def step(self, k: int) -> dict[str, Part]:
        if k == 3:
            raise ZeroDivisionError("the plan broke at step 3")
        return {"all": Part(np.arange(4), np.arange(4))}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_a_worker_reaches_the_consumer(index: Index, num_workers: int) -> None:
    stream = Stream(index, None, _FailingPlan(), num_workers=num_workers)
    iterator = iter(stream)
    assert [len(next(iterator)["all"]) for _ in range(3)] == [4, 4, 4]
    with pytest.raises(ZeroDivisionError, match="the plan broke at step 3"):
        next(iterator)
    assert not _workers()


def _workers() -> list[BaseProcess]:
    time.sleep(0.05)
    return [child for child in multiprocessing.active_children() if child.daemon]  # not the ranks of other tests


def test_closing_early_ends_the_workers(index: Index) -> None:
    iterator = iter(Stream(index, None, _plan(4), num_workers=2))
    next(iterator)
    assert len(_workers()) == 2
    iterator.close()  # type: ignore[attr-defined]
    assert not _workers()
    for _ in Stream(index, None, _plan(4), num_workers=2):
        break
    assert not _workers()


def test_few_shards_are_open_at_a_time(tmp_path: Path) -> None:
    index = Index.open(make_dataset(tmp_path / "set", [2] * 80), "train")
    plan = sweep(160, rank=0, size=1, batch_size=160)
    before = len(os.listdir("/proc/self/fd"))
    iterator = iter(Stream(index, None, plan))
    _check(next(iterator)["all"], plan.step(0)["all"])
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert not list(iterator)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_sent_to_a_worker_does_not_grow_with_the_data_set(index: Index) -> None:
    stream = Stream(index, None, _plan(), num_workers=2)
    (loader,) = stream._loader("name").pipeline
    sent = pickle.dumps(loader.dataset)
    assert len(sent) < 2_000
    assert [load.step for load in pickle.loads(sent)] == list(range(10))


def test_secure_mode_is_on() -> None:
    with pytest.raises(ValueError, match="cannot open pipe"):
        webdataset.gopen("pipe:echo")
