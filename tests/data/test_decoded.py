"""Decoded images that are kept: the same pixels as decoding gives, whatever happens to the file."""

import errno
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nldist.config.file import load_config
from nldist.data.decoded import DecodedCache, decoded_cache
from nldist.data.index import Index
from nldist.data.plan import shuffled
from nldist.data.stream import Batch, Stream
from nldist.errors import UserError
from nldist.passes.data import NodeCaches
from tests.data.make import id_image, make_dataset
from tests.jobs import DIGITS, run_job
from tests.ranks import CONTEXT
from tests.test_train import SHORT, assert_same_weights

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SHARD_SIZES = [30, 1, 60]
NUM = sum(SHARD_SIZES)
MAX_SIDE = 40


def photograph(id_: int) -> np.ndarray:
    """Images of uneven sizes, some beyond MAX_SIDE."""
    return np.random.default_rng(id_).integers(0, 256, (5 + id_ % 37, 7 + id_ * 5 % 53, 3), dtype=np.uint8)


@pytest.fixture(params=["one size", "many sizes"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Index:
    render = id_image if request.param == "one size" else photograph
    return Index.open(make_dataset(tmp_path / "set", SHARD_SIZES, render=render), "train")


@dataclass
class Reading:
    """Reads all images of an index in batches of 16, in an order of its own for each epoch."""

    index: Index
    folder: Path
    num_workers: int = 0

    @property
    def cache(self) -> DecodedCache:
        cache = decoded_cache(self.index, MAX_SIDE, self.folder, 2**20)
        assert cache is not None
        return cache

    def batches(self, epoch: int, cache: DecodedCache | None) -> Iterator[Batch]:
        plan = shuffled(NUM, rank=0, size=1, batch_size=16, seed=0, epoch=epoch, window=30)
        stream = Stream(self.index, None, plan, max_side=MAX_SIDE, decoded=cache, num_workers=self.num_workers)
        for batches in stream:
            yield batches["all"]

    def assert_right(self, epoch: int, cache: DecodedCache) -> None:
        for kept, decoded in zip(self.batches(epoch, cache), self.batches(epoch, None), strict=True):
            assert torch.equal(kept.ids, decoded.ids)
            assert torch.equal(kept.sizes, decoded.sizes)
            assert torch.equal(kept.images, decoded.images)

    def lose_shards(self) -> None:
        for shard in self.index.shards:
            Path(shard).rename(f"{shard}.lost")

    def find_shards(self) -> None:
        for shard in self.index.shards:
            Path(f"{shard}.lost").rename(shard)

    @property
    def file(self) -> Path:
        (file,) = self.folder.glob("*.pixels")
        return file


@pytest.fixture
def reading(index: Index, tmp_path: Path) -> Reading:
    return Reading(index, tmp_path / "cache")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_decoded_twice_and_pixels_are_the_same(reading: Reading, num_workers: int) -> None:
    reading.num_workers = num_workers
    for epoch in range(3):
        reading.assert_right(epoch, reading.cache)
    reading.lose_shards()
    seen = sum(len(batch) for batch in reading.batches(3, reading.cache))
    assert seen == NUM, "what is kept needs no shard"


def test_what_is_damaged_is_decoded_again(reading: Reading) -> None:
    reading.assert_right(0, reading.cache)
    content = bytearray(reading.file.read_bytes())
    for place in np.random.default_rng(0).integers(0, len(content), 40).tolist():
        content[place] ^= 255
    reading.file.write_bytes(content)
    reading.assert_right(1, reading.cache)
    reading.lose_shards()
    assert sum(len(batch) for batch in reading.batches(2, reading.cache)) == NUM, "and kept again"


def test_a_file_that_was_cut_short_or_is_not_whole(reading: Reading) -> None:
    reading.assert_right(0, reading.cache)
    os.truncate(reading.file, 5000)
    reading.assert_right(1, reading.cache)
    reading.file.write_bytes(bytes(NUM * 4))
    reading.assert_right(2, reading.cache)


def read(reading: Reading, epoch: int) -> None:
    reading.assert_right(epoch, reading.cache)


def test_processes_share_it_from_its_beginning(reading: Reading) -> None:
    processes = [CONTEXT.Process(target=read, args=(reading, epoch)) for epoch in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    reading.lose_shards()
    assert sum(len(batch) for batch in reading.batches(5, reading.cache)) == NUM


def test_bad_images_are_told_in_every_pass(tmp_path: Path) -> None:
    index = Index.open(make_dataset(tmp_path / "set", SHARD_SIZES), "train")
    with open(index.shards[0], "r+b") as file:
        file.seek(int(index.offset[3]) + 20)
        file.write(b"damage")
    cache = decoded_cache(index, MAX_SIDE, tmp_path / "cache", 2**20)
    for epoch in range(2):
        plan = shuffled(NUM, rank=0, size=1, batch_size=16, seed=0, epoch=epoch, window=30)
        stream = Stream(index, None, plan, max_side=MAX_SIDE, decoded=cache)
        seen = torch.cat([batches["all"].ids for batches in stream]).tolist()
        assert sorted(seen) == [id_ for id_ in range(NUM) if id_ != 3]
        assert stream.num_bad == 1


def test_a_full_disk_ends_the_keeping_not_the_run(
    reading: Reading, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, written = os.pwrite, 0

    def pwrite(file: int, data: bytes, place: int) -> int:
        nonlocal written
        written += len(data)
        if written > 2000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(file, data, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    cache = reading.cache
    for epoch in range(2):
        reading.assert_right(epoch, cache)
    assert [record.message for record in caplog.records] == [
        f"decoded images are kept no more: {reading.folder}: No space left on device"
    ]


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("kilobytes", [8, 40])
def test_a_full_disk_in_memory(kilobytes: int, tmp_path: Path) -> None:
    """Where reading what was never written would end the process."""
    (folder := tmp_path / "small").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], check=False)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        index = Index.open(make_dataset(tmp_path / "set", [3000]), "train")
        cache = decoded_cache(index, MAX_SIDE, folder, 2**20)
        assert cache is not None
        process = CONTEXT.Process(target=fill, args=(cache, 3000))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(cache: DecodedCache, num_images: int) -> None:
    """Keep images until the disk is full; those that are there are right."""
    for id_ in range(num_images):
        cache.keep(id_, id_image(id_))
    out = np.empty((num_images, 6, 8, 3), np.uint8)
    there = cache.take(np.arange(num_images), np.tile([6, 8], (num_images, 1)), out)
    assert not there.all()
    assert all((out[id_] == id_image(id_)).all() for id_ in np.flatnonzero(there).tolist())


def test_what_does_not_fit_is_not_kept(index: Index, tmp_path: Path) -> None:
    assert decoded_cache(index, MAX_SIDE, tmp_path, 1000) is None
    first = decoded_cache(index, MAX_SIDE, tmp_path, 2**20)
    assert first is not None
    assert decoded_cache(index, MAX_SIDE, tmp_path, first.num_bytes) is not None
    assert decoded_cache(index, MAX_SIDE, tmp_path, first.num_bytes, [first]) is None, "beside what is in use"


def test_those_used_longest_ago_go_first(tmp_path: Path) -> None:
    indices = [Index.open(make_dataset(tmp_path / f"set{n}", [40 + n]), "train") for n in range(3)]
    files: list[Path] = []
    for number, index in enumerate(indices):
        cache = decoded_cache(index, MAX_SIDE, tmp_path, 24_000)  # two of them
        assert cache is not None
        cache.keep(0, id_image(0))
        (new,) = set(tmp_path.glob("*.pixels")) - set(files)
        files.append(new)
        os.utime(new, (number, number))
        if number == 1:
            os.utime(files[0])
    assert [file.exists() for file in files] == [True, False, True]


@pytest.mark.skipif(os.getuid() != 0, reason="makes a directory of another user")
def test_without_a_directory_it_is_the_users_own(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = load_config(DIGITS, [f"data.root={digits}", "data.decoded_cache_gib=0.1"])
    index = Index.open(digits, "train")
    assert NodeCaches(config.data).decoded(index) is not None
    folder = tmp_path / f"nldist-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    os.chown(folder, 12345, 12345)
    with pytest.raises(UserError, match=r"is not yours: set data\.cache_dir"):
        NodeCaches(config.data).decoded(index)


def test_a_run_with_it_ends_with_the_same_weights(few_digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={few_digits}", *SHORT)
    kept = (*arguments, "data.decoded_cache_gib=0.1", f"data.cache_dir={tmp_path / 'cache'}")
    assert run_job(tmp_path / "plain", *arguments, world_size=2) == [0, 0]
    assert run_job(tmp_path / "kept", *kept, world_size=2, kill=(1, 12))[1] == -9
    assert run_job(tmp_path / "kept", *kept, "data.num_workers=1", world_size=2) == [0, 0]
    assert_same_weights(tmp_path / "plain", tmp_path / "kept")
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").glob("*.pixels"))
    assert sizes == [4096 + 120 * 8 * 8 * 3, 4096 + 479 * 8 * 8 * 3]
