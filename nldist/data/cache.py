"""Copies of remote shards on a local disk, the least recently used going first."""

import fcntl
import glob
import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from nldist.data.remote import RemoteFile, scheme_of, without_secrets
from nldist.errors import UserError
from nldist.files import replacing

_BLOCK = 1 << 20
_TELL_SECONDS = 60.0  # how often a copy that takes long is told of

_log = logging.getLogger(__name__)


class ShardCache:
    """A directory of copies that all processes of a node may share.

    Args:
        cache_dir: the directory, made if need be.
        max_bytes: once the copies are larger than this together, those opened longest ago are removed. Copies
            that this process has open stay (another process's open file outlives its removal).

    Raises:
        UserError: the directory cannot be made.
    """

    def __init__(self, cache_dir: str | Path, max_bytes: int) -> None:
        self.cache_dir, self.max_bytes = Path(cache_dir).absolute(), max_bytes
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir={cache_dir} cannot be made: {error.strerror}; set another one") from None
        self._opened: Counter[str] = Counter()

    def open(self, url: str, sha256: str | None = None, num_bytes: int | None = None) -> int:
        """A file descriptor of the local copy of `url`, which is made first if need be.

        Call `closed` after closing it.

        Args:
            url: the remote shard.
            sha256: the digest that the copy must have, if known.
            num_bytes: the size that it must have, if known.

        Raises:
            UserError: the shard cannot be copied, or the copy has another digest or size.
        """
        scheme_of(url)
        path = self._path(url, sha256)
        while True:
            with suppress(FileNotFoundError):
                file = os.open(path, os.O_RDONLY)
                break
            with self._locked(path.name):
                if not path.exists():
                    for left in self.cache_dir.glob(
                        f".{glob.escape(path.name)}.*.part"
                    ):  # by a process that was killed
                        left.unlink(missing_ok=True)
                    _copy(url, path, sha256, num_bytes)
            # It may be gone again, removed by another process: then it is copied again.
        os.utime(file)
        self._opened[path.name] += 1
        with self._locked("evict"):
            self._evict(keep=path)
        return file

    def closed(self, url: str, sha256: str | None = None) -> None:
        """Say that a descriptor of `url`, opened with `sha256`, was closed."""
        self._opened[self._path(url, sha256).name] -= 1

    def _path(self, url: str, sha256: str | None) -> Path:
        """Another one for another content: a shard may be uploaded anew."""
        digest = hashlib.sha256(f"{url} {sha256}".encode()).hexdigest()[:16]
        return self.cache_dir / f"{digest}-{Path(urlsplit(url).path).name[-40:]}.copy"

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with open(self.cache_dir / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _evict(self, keep: Path) -> None:
        copies = []
        for path in self.cache_dir.glob("*.copy"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                copies.append((facts.st_mtime_ns, facts.st_size, path))
        excess = sum(size for _, size, _ in copies) - self.max_bytes
        for _, size, path in sorted(copies):
            if excess <= 0:
                break
            if path != keep and not self._opened[path.name]:
                path.unlink(missing_ok=True)
                excess -= size


def _copy(url: str, path: Path, sha256: str | None, num_bytes: int | None) -> None:
    digest, place = hashlib.sha256(), without_secrets(url)
    try:
        with replacing(path) as aside:
            with aside.open("wb") as out, RemoteFile(url, num_bytes) as shard:
                for block in _told(shard, place):
                    digest.update(block)
                    out.write(block)
            if sha256 is not None and digest.hexdigest() != sha256:
                what = "what arrived differs from what dataset.json names (SHA-256); upload it again"
                raise UserError(f"shard {place}: {what}")
    except OSError as error:
        what = "free some space, or set another data.cache_dir"
        raise UserError(f"shard {place}: cannot be copied to {path.parent} ({error.strerror}); {what}") from None


def _told(shard: RemoteFile, place: str) -> Iterator[bytes]:
    """The blocks of a shard; of one that takes long it is told how far it is."""
    begin = told = time.monotonic()
    done = 0
    while block := shard.read(_BLOCK):
        yield block
        done += len(block)
        if (now := time.monotonic()) > told + _TELL_SECONDS:
            told, megabytes = now, done / 1e6
            _log.info("shard %s: %.0f MB copied, %.1f MB/s", place, megabytes, megabytes / (now - begin))
