"""Remote shards are whole or refused, whatever becomes of the connections; nothing secret is told."""

import logging
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from nldist.data import remote
from nldist.data.remote import RemoteFile
from nldist.errors import UserError
from tests.conftest import REPOSITORY
from tests.file_server import FileServer
from tests.s3_server import S3Server

CONTENT = os.urandom(1 << 20) * 12  # more than one request to S3


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short waits between tries, and no credentials but those that a test gives."""
    monkeypatch.setattr(remote, "WAITS", (0.01,) * 5)
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits for tests in which nothing comes."""
    monkeypatch.setattr(remote, "READ_SECONDS", 1.0)
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 1.0)


@pytest.fixture
def http(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a b.tar").write_bytes(CONTENT)
    with FileServer(tmp_path / "served") as server:
        yield server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    file = tmp_path_factory.mktemp("store") / "a.tar"
    file.write_bytes(CONTENT)
    with S3Server() as server:
        server.upload(file, "set/a.tar")
        yield server


@pytest.fixture
def s3(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in store.env.items():
        monkeypatch.setenv(name, value)
    store.asked.clear()
    yield store
    store.faults.clear()


URL = "s3://shards/set/a.tar"


def read(url: str, num_bytes: int | None = None) -> bytes:
    with RemoteFile(url, num_bytes) as file:
        return b"".join(iter(lambda: file.read(1 << 18), b""))


def refusal(url: str, num_bytes: int | None = None) -> str:
    with pytest.raises(UserError) as raised:
        read(url, num_bytes)
    text = str(raised.value)
    assert "\n" not in text
    assert not re.search("secret|nottobetold", text)
    return text


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("faults", [[], ["drop"], ["drop", "drop", "hang"], ["silent"], [503, 429, "drop", 500]])
@pytest.mark.usefixtures("hurried")
def test_http_goes_on_where_it_was(http: FileServer, faults: list[str | int], knows_ranges: bool) -> None:
    http.faults, http.knows_ranges = list(faults), knows_ranges
    assert read(f"{http.url}/a b.tar") == CONTENT
    assert len(http.requests) == len(faults) + 1
    if faults == ["drop"]:
        assert http.ranges[0] is None
        assert http.ranges[1] in range(1, len(CONTENT) // 2 + 1)


@pytest.mark.parametrize("faults", [[], ["drop"], ["", "drop", "drop"], ["hang"], [503, "", 500, 429]])
@pytest.mark.usefixtures("hurried")
def test_s3_goes_on_where_it_was(s3: S3Server, faults: list[str | int]) -> None:
    s3.faults = list(faults)
    assert read(URL) == CONTENT
    begins = [int(asked.partition("-")[0]) for asked in s3.asked]
    assert begins == sorted(begins)
    assert len(begins) == 2 + sum(fault != "" for fault in faults)


@pytest.mark.parametrize("fault", ["drop", 503])
@pytest.mark.usefixtures("hurried")
def test_a_server_that_keeps_failing_is_told_of_once(
    http: FileServer, s3: S3Server, fault: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    http.faults, s3.faults = [fault] * 20, [fault] * 20
    with caplog.at_level(logging.WARNING):
        for url in (f"{http.url.replace('//', '//me:secret@')}/a b.tar?X-Signature=secret", URL):
            assert "after 6 tries" in refusal(url)
    assert (len(http.requests), len(s3.asked)) == (6, 6)
    assert len(caplog.records) == 10
    assert "secret" not in caplog.text


def test_fewer_bytes_than_there_must_be_are_found(http: FileServer) -> None:
    url, size = f"{http.url}/a b.tar", len(CONTENT)
    http.faults = ["unannounced", "cut", "unannounced"]
    assert "does not say how long" in refusal(url)
    assert f"has {size // 2:,} bytes in place of {size:,}" in refusal(url, size)
    assert read(url, size) == CONTENT  # the third is made whole by a further request
    assert "in place of 5;" in refusal(url, 5)


def test_a_shard_that_is_replaced_meanwhile_is_no_mixture_of_both(http: FileServer, tmp_path: Path) -> None:
    file = RemoteFile(f"{http.url}/a b.tar")
    http.faults = ["drop"]
    assert file.read(1000) == CONTENT[:1000]
    (tmp_path / "served" / "a b.tar").write_bytes(bytes(len(CONTENT)))
    os.utime(tmp_path / "served" / "a b.tar", (1, 1))
    with pytest.raises(UserError, match="was replaced while it was read"):
        list(iter(lambda: file.read(1 << 20), b""))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("{http}/none.tar", "it is not there"),
        ("s3://shards/none.tar", "it is not there"),
        ("s3://nowhere/none.tar", "it is not there"),
        ("http://127.0.0.1:9/a.tar?key=secret", "after 6 tries"),
        ("s3://me:secret@shards/set/a.tar", "set AWS_ACCESS_KEY_ID"),
        ("http://[::1/secret.tar", "no URL"),
        ("http:///a.tar", "no URL"),
        ("s3://shards", "no URL"),
        ("pipe:touch {mark}; echo ://", "is not read; remote shards are http, https, s3"),
        ("file://{mark}", "is not read"),
        ("local://{mark}", "is not read"),
        ("simplecache::{http}/a b.tar", "is not read"),
        ("gs://shards/a.tar", "is not read"),
        ("{http}/a b.tar::file://{mark}", "it is not there"),
    ],
)
def test_what_is_no_shard_is_refused(http: FileServer, s3: S3Server, tmp_path: Path, url: str, words: str) -> None:
    mark = tmp_path / "mark"
    assert words in refusal(url.format(http=http.url, mark=mark))
    assert not mark.exists()


def test_wrong_and_missing_credentials(http: FileServer, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    http.authorization = "Basic bWU6c2VjcmV0"
    assert "HTTP 401" in refusal(f"{http.url}/a b.tar")
    s3.faults = [403]
    assert "AWS_*" in refusal(URL)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "AWS_*" in refusal(URL)


def test_credentials_of_files(http: FileServer, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    http.authorization = "Basic bWU6c2VjcmV0"
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    assert read(f"{http.url}/a b.tar") == CONTENT
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = secret\n")
    assert read(URL) == CONTENT


SIZE = """
import sys
from nldist.data.remote import RemoteFile
from nldist.errors import UserError
for name in sys.argv[2:]:
    sys.modules[name] = None  # as if it were not installed
try:
    print(len(b"".join(iter(lambda file=RemoteFile(sys.argv[1]): file.read(1 << 20), b""))))
except UserError as error:
    print(error)
"""


def size_elsewhere(url: str, *missing: str, env: Mapping[str, str]) -> str:
    """What a process of its own says of a shard, with these modules missing."""
    command = [sys.executable, "-c", SIZE, url, *missing]
    return subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | dict(env), check=True, capture_output=True, text=True
    ).stdout.strip()


def test_credentials_of_fsspec_s_variables(s3: S3Server) -> None:
    env = {"FSSPEC_S3_KEY": "a", "FSSPEC_S3_SECRET": "secret", "FSSPEC_S3_ENDPOINT_URL": s3.env["AWS_ENDPOINT_URL"]}
    gone = dict.fromkeys(s3.env, "")
    assert size_elsewhere(URL, env=gone | env) == str(len(CONTENT))
    env = {"FSSPEC_S3_ANON": "true", "AWS_ENDPOINT_URL": s3.env["AWS_ENDPOINT_URL"]}
    assert size_elsewhere(URL, env=gone | env) == str(len(CONTENT))


def test_a_missing_package_is_named(http: FileServer) -> None:
    assert "python -m pip install s3fs" in size_elsewhere(URL, "s3fs", env={})
    assert "python -m pip install aiohttp" in size_elsewhere(f"{http.url}/a b.tar", "aiohttp", env={})


@pytest.mark.usefixtures("hurried")
def test_a_server_that_takes_no_connection() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for other in waiting:
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        assert "after 6 tries" in refusal(f"http://127.0.0.1:{full.getsockname()[1]}/a.tar")
        for other in waiting:
            other.close()


def _read_in_child(url: str) -> None:
    sys.exit(read(url) != CONTENT)


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_processes_forked_after_reading_read_too(http: FileServer, s3: S3Server, scheme: str) -> None:
    """fsspec reads by a thread, which a forked process lacks."""
    url = URL if scheme == "s3" else f"{http.url}/a b.tar"
    assert read(url) == CONTENT
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_read_in_child, args=(url,)) for _ in range(3)]
    for child in children:
        child.start()
    assert read(url) == CONTENT
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]


def test_other_errors_keep_their_traceback(http: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the code is not told as the server's."""

    def broken(*_: object) -> None:
        raise KeyError("mistake")

    monkeypatch.setattr(remote, "_from_http", broken)
    with pytest.raises(KeyError):
        read(f"{http.url}/a b.tar")
