"""The bytes of remote shards, over HTTP(S) and S3, whatever becomes of the connections meanwhile."""

import asyncio
import contextlib
import logging
import re
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from nldist.errors import UserError

# What may be read: of fsspec's protocols those that only fetch bytes from a server; with the package that each needs.
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
CONNECT_SECONDS, READ_SECONDS = 20.0, 60.0  # longest waits for a connection, and for further bytes
_BLOCK = 2**23  # bytes per request to S3
_AGAIN = (408, 425, 429)  # of the 4xx those that ask to come again

_log = logging.getLogger(__name__)


def is_url(place: str) -> bool:
    """Whether a shard's place is a URL, not a path."""
    return "://" in place


def without_secrets(place: str) -> str:
    """A shard's place, to be told: of a URL without user, password and query."""
    if not is_url(place):
        return place
    try:
        parts = urlsplit(place)
    except ValueError:
        return f"{place.partition('://')[0]}://(malformed)"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


class RemoteFile:
    """A remote shard, read once from its begin to its end.

    A connection that fails, hangs or ends early is made anew, a bounded number of times with growing waits, and goes on
    where it was (by a Range request; where the server knows none, what was read before is read over).

    Args:
        url: http, https or s3. Credentials come from the environment and the user's files (docs/data.md).
        num_bytes: how many there must be, if known.

    Raises:
        UserError: on opening, it is no such URL; on reading, all tries have failed, a further one would be in vain, or
            its size is another.
    """

    def __init__(self, url: str, num_bytes: int | None = None) -> None:
        self._url, self._num_bytes = url, num_bytes
        self._scheme = scheme_of(url)
        self._waits = list(WAITS)
        self._system: Any = None
        self._answer: _Answer | None = None
        self._done = 0
        self._version: str | None = None

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def read(self, size: int) -> bytes:
        """At least one and at most `size` further bytes; none at the end."""
        while True:
            try:
                return self._read(size)
            except UserError:
                raise
            except Exception as error:  # of aiohttp, botocore, s3fs or fsspec, which have no base in common
                self._wait_after(error)

    def close(self) -> None:
        """End the connection."""
        if self._answer is not None:
            with contextlib.suppress(Exception):  # it may be broken
                self._answer.file.close()
            self._answer = None
        if self._system is not None:
            # Its methods refer to it and it to them: with this it goes at once, and closes its connections. It must not
            # be left to the garbage collector of a process forked later, where closing would wait for a thread in vain.
            vars(self._system).clear()
            self._system = None

    def _read(self, size: int) -> bytes:
        if self._answer is None:
            self._answer = self._opened()
        block: bytes = self._answer.file.read(size)
        self._done += len(block)
        if not block and self._num_bytes is not None and self._done < self._num_bytes:
            raise ConnectionError(f"the answer ended after {self._done:,} of {self._num_bytes:,} bytes")
        return block

    def _opened(self) -> "_Answer":
        """An answer that stands where reading has got to."""
        self._system = _filesystem(self._url)
        answers = _from_s3 if self._scheme == "s3" else _from_http
        answer = self._answer = answers(self._system, self._url, self._done)
        if problem := self._problem(answer):
            raise UserError(f"shard {without_secrets(self._url)}: {problem}")
        self._version, self._num_bytes = answer.version or self._version, self._num_bytes or answer.num_bytes
        behind = self._done - answer.offset
        while behind:
            block = answer.file.read(min(behind, _BLOCK))
            if not block:
                raise ConnectionError("the answer ended early")
            behind -= len(block)
        return answer

    def _problem(self, answer: "_Answer") -> str | None:
        """Why an answer is of no use."""
        if None not in (self._version, answer.version) and self._version != answer.version:
            return "was replaced while it was read; run again"
        if self._num_bytes is None and answer.num_bytes is None and not answer.has_end:
            return "its server does not say how long it is, so that a cut would not be noticed; use another server"
        if answer.num_bytes is not None and self._num_bytes not in (None, answer.num_bytes):
            return f"has {answer.num_bytes:,} bytes in place of {self._num_bytes:,}; upload it again, whole"
        return None

    def _wait_after(self, error: Exception) -> None:
        """Wait for the next try, if there may be one."""
        may_pass = _may_pass(error)
        traceback.clear_frames(error.__traceback__)  # or its frames would keep the connections open
        self.close()
        place, reason = without_secrets(self._url), _reason(error)
        if not may_pass:
            raise UserError(f"shard {place}: cannot be read ({reason}); {_advice(error, self._scheme)}") from None
        if not self._waits:
            tries = f"after {len(WAITS) + 1} tries and {self._done:,} bytes"
            what = "see that the server can be reached from this node, then the same command goes on"
            raise UserError(f"shard {place}: cannot be read ({reason}), {tries}; {what}") from None
        wait = self._waits.pop(0)
        _log.warning("shard %s: %s, after %s bytes; trying again in %g s", place, reason, f"{self._done:,}", wait)
        time.sleep(wait)


@dataclass
class _Answer:
    """What a server sends.

    Attributes:
        file: fsspec's, to read from.
        offset: at which byte of the shard it stands.
        num_bytes: the shard's size, if told.
        version: another one for another content, if told.
        has_end: whether its end can be told from a lost connection.
    """

    file: Any
    offset: int
    num_bytes: int | None
    version: str | None
    has_end: bool = True


def scheme_of(url: str) -> str:
    """The scheme of a URL. Raises UserError: it is none that may be read."""
    scheme, place = url.partition("://")[0], without_secrets(url)
    if scheme not in PACKAGES:
        raise UserError(f"shard {place}: {scheme}:// is not read; remote shards are {', '.join(PACKAGES)} URLs")
    if "(malformed)" in place or not (parts := urlsplit(url)).netloc or not parts.path.strip("/"):
        raise UserError(f"shard {place}: this can be no URL of a shard; correct it")
    if scheme == "s3" and "@" in parts.netloc:
        raise UserError(f"shard {place}: a key in a URL is not read; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return scheme


def _from_http(system: Any, url: str, offset: int) -> _Answer:
    headers = {**system.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    # A block size of 0 streams one answer; the size, any but 0, spares a request for it.
    file = system.open(url, "rb", block_size=0, size=1, headers=headers)
    told, status = file.r.headers, file.r.status
    part = re.match(r"bytes (\d+)-\d+/(\d+)", told.get("Content-Range", "")) if status == 206 else None
    version = told.get("ETag") or told.get("Last-Modified")
    if part:
        return _Answer(file, int(part[1]), int(part[2]), version)
    plain = told.get("Content-Encoding", "identity") == "identity"
    length = int(told["Content-Length"]) if plain and "Content-Length" in told else None
    return _Answer(file, 0, length, version, "Content-Length" in told or told.get("Transfer-Encoding") == "chunked")


def _from_s3(system: Any, url: str, offset: int) -> _Answer:
    file = system.open(url, "rb", block_size=_BLOCK, cache_type="readahead")
    file.seek(offset)
    return _Answer(file, offset, file.size, file.details.get("ETag"))


def _filesystem(url: str) -> Any:
    """fsspec's file system for a URL, with limits where the user's own settings (FSSPEC_*) have none.

    It is made for this one file: the connections of one that stays would not survive a fork.
    """
    scheme = url.partition("://")[0]
    try:
        import aiohttp  # slow to import, as all below
        import fsspec
        from fsspec.config import apply_config

        kind = fsspec.get_filesystem_class(scheme)
    except ImportError:
        told = f"reading {scheme}:// needs the package {PACKAGES[scheme]}; python -m pip install {PACKAGES[scheme]}"
        raise UserError(f"shard {without_secrets(url)}: {told}") from None
    if scheme == "s3":
        options: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        name, options["retries"] = "config_kwargs", {"total_max_attempts": 1}  # `RemoteFile` makes further ones
    else:
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        name, options = "client_kwargs", {"timeout": limits, "trust_env": True}  # the latter for ~/.netrc
    system = kind(**{name: options | apply_config(kind, {}).get(name, {})}, skip_instance_cache=True)
    system.retries = 1  # s3fs's own
    return system


def _may_pass(error: Exception) -> bool:
    """Whether a further try may succeed; raises an error that is not of reading from a server."""
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status >= 500 or error.status in _AGAIN
    if isinstance(error, (FileNotFoundError, PermissionError, ValueError)):
        return False
    if isinstance(error, (OSError, aiohttp.ClientError, asyncio.TimeoutError)):
        return True
    # botocore is not imported where nobody reads from S3.
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"BotoCoreError", "ClientError"}:
        raise error
    return bool(names & {"HTTPClientError", "ConnectionError", "IncompleteReadError"})


def _reason(error: Exception) -> str:
    """What happened, in one line, without secrets."""
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) and not str(error):
        return f"nothing came for {READ_SECONDS:g} s"
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if type(error).__name__ == "ClientPayloadError":
        return "the connection was lost"
    status = getattr(error, "status", None)
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if status:
        text = f"HTTP {status} {getattr(error, 'message', '')}"
    return re.sub(r"\w+://[^\s'\"<>]+", lambda found: without_secrets(found[0]), " ".join(text.split()))[:300]


def _advice(error: Exception, scheme: str) -> str:
    if isinstance(error, FileNotFoundError):
        return "correct its place, or upload it"
    if scheme == "s3":
        return "credentials come from AWS_* or ~/.aws, the server's place from AWS_ENDPOINT_URL (docs/data.md)"
    denied = getattr(error, "status", None) in (401, 403)
    return "credentials come from ~/.netrc (docs/data.md)" if denied else "correct its place"
