import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from nldist.data import remote
from nldist.data.cache import ShardCache
from nldist.data.index import Index
from nldist.data.plan import sweep
from nldist.data.stream import Stream
from nldist.errors import UserError
from tests.data.make import decode_id, make_dataset
from tests.file_server import FileServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "WAITS", (0.01,) * 5)
    (tmp_path / "served").mkdir()
    with FileServer(tmp_path / "served") as server:
        yield server


def _serve_files(tmp_path: Path, count: int, size: int = 1000) -> None:
    for i in range(count):
        (tmp_path / "served" / f"{i}.tar").write_bytes(bytes([i]) * size)


def _copies(cache: ShardCache) -> list[str]:
    return sorted(path.name.split("-")[1] for path in cache.cache_dir.glob("*.copy"))


def _open_and_close(cache: ShardCache, url: str) -> bytes:
    file = cache.open(url)
    data = os.pread(file, 2000, 0)
    os.close(file)
    cache.closed(url)
    return data


def test_the_least_recently_used_copies_go_first(server: FileServer, tmp_path: Path) -> None:
    _serve_files(tmp_path, 5)
    cache = ShardCache(tmp_path / "cache", max_bytes=3000)
    for i in (0, 1, 2, 0, 3, 0, 4):
        assert _open_and_close(cache, f"{server.url}/{i}.tar") == bytes([i]) * 1000
    assert _copies(cache) == ["0.tar.copy", "3.tar.copy", "4.tar.copy"]
    assert server.requests == ["/0.tar", "/1.tar", "/2.tar", "/3.tar", "/4.tar"]


def test_copies_in_use_stay(server: FileServer, tmp_path: Path) -> None:
    _serve_files(tmp_path, 3)
    cache = ShardCache(tmp_path / "cache", max_bytes=1000)
    file = cache.open(f"{server.url}/0.tar")
    _open_and_close(cache, f"{server.url}/1.tar")
    _open_and_close(cache, f"{server.url}/2.tar")
    assert _copies(cache) == ["0.tar.copy", "2.tar.copy"]
    os.close(file)
    cache.closed(f"{server.url}/0.tar")
    _open_and_close(cache, f"{server.url}/1.tar")
    assert _copies(cache) == ["1.tar.copy"]


def _open_at_once(cache: ShardCache, url: str, start: "multiprocessing.synchronize.Barrier") -> None:
    start.wait()
    assert _open_and_close(cache, url) == bytes(1000)


def test_processes_that_want_one_shard_copy_it_once(server: FileServer, tmp_path: Path) -> None:
    _serve_files(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", max_bytes=10**6)
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    args = (cache, f"{server.url}/0.tar", start)
    processes = [context.Process(target=_open_at_once, args=args) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.requests == ["/0.tar"]


def test_what_cannot_be_copied_is_named_and_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    _serve_files(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", max_bytes=10**6)
    with pytest.raises(UserError, match=rf"shard {server.url}/9\.tar: cannot be read \(it is not there"):
        cache.open(f"{server.url}/9.tar")
    with pytest.raises(UserError, match="SHA-256"):
        cache.open(f"{server.url}/0.tar", sha256="0" * 64)
    with pytest.raises(UserError, match="has 1,000 bytes in place of 2,000"):
        cache.open(f"{server.url}/0.tar", num_bytes=2000)
    assert not _copies(cache)
    assert not list(cache.cache_dir.glob(".*.part"))


def test_a_shard_that_was_uploaded_anew_is_copied_anew(server: FileServer, tmp_path: Path) -> None:
    cache, url = ShardCache(tmp_path / "cache", max_bytes=10**6), f"{server.url}/0.tar"
    for content in (b"old", b"new"):
        (tmp_path / "served" / "0.tar").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        for _ in range(2):
            file = cache.open(url, digest, len(content))
            assert os.pread(file, 10, 0) == content
            os.close(file)
            cache.closed(url, digest)
    assert len(server.requests) == 2


def test_a_copy_that_was_not_finished_goes_when_the_shard_is_wanted_again(server: FileServer, tmp_path: Path) -> None:
    """By a process that was killed: else they would fill the disk."""
    _serve_files(tmp_path, 1)
    cache = ShardCache(tmp_path / "cache", max_bytes=10**6)
    _open_and_close(cache, f"{server.url}/0.tar")
    (copy,) = cache.cache_dir.glob("*.copy")
    copy.unlink()
    (cache.cache_dir / f".{copy.name}.0123.part").write_bytes(b"half")
    (cache.cache_dir / ".of-another.copy.0123.part").write_bytes(b"half")
    _open_and_close(cache, f"{server.url}/0.tar")
    assert [path.name for path in cache.cache_dir.glob(".*.part")] == [".of-another.copy.0123.part"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_reads_remote_shards_through_the_cache(server: FileServer, tmp_path: Path, num_workers: int) -> None:
    root = make_dataset(tmp_path / "served" / "set", [20, 3, 30])
    facts = json.loads((root / "dataset.json").read_text())
    for shard in facts["splits"]["train"]["shards"]:
        shard["path"] = f"{server.url}/set/{shard['path']}"
    (root / "dataset.json").write_text(json.dumps(facts))
    index = Index.open(root, "train")
    cache = ShardCache(tmp_path / "cache", max_bytes=1)
    plan = sweep(53, rank=0, size=1, batch_size=8)
    server.faults = ["drop", 503]
    for batches in Stream(index, None, plan, cache=cache, num_workers=num_workers):
        assert [decode_id(image.numpy()) for image in batches["all"].images] == batches["all"].ids.tolist()
    assert set(server.requests) == {f"/set/train/train-{s:06d}.tar" for s in range(3)}
    with pytest.raises(UserError, match=r"is remote: set data\.cache_dir"):
        list(Stream(index, None, plan))
    # Nor is an epoch ever short: what cannot be read ends it.
    cache = ShardCache(tmp_path / "other", max_bytes=10**6)
    server.faults = ["", *["drop"] * 20]
    with pytest.raises(UserError, match="after 6 tries"):
        list(Stream(index, None, plan, cache=cache, num_workers=num_workers))


@pytest.mark.parametrize("name", ["a" * 230 + ".tar", "**[x].tar", "é" * 60 + ".tar"])
def test_odd_names_of_shards(name: str, server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "served" / name).write_bytes(b"content")
    url = f"{server.url}/" + quote(name, safe="*[]")
    assert _open_and_close(ShardCache(tmp_path / "cache", 3000), url) == b"content"


def test_what_is_no_url_is_refused_before_a_name_is_made_of_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this can be no URL of a shard"):
        ShardCache(tmp_path / "cache", 3000).open("http://[bad/train.tar")
