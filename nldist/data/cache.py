"""Copies of remote shards on a local disk, the least recently used going first."""

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import webdataset

from nldist.errors import UserError
from nldist.files import replacing

# webdataset's secure mode: no `pipe:` commands, no rewriting of addresses through the environment, no pickle.
webdataset.utils.enforce_security = True

_BLOCK = 1 << 20


def is_url(place: str) -> bool:
    """Whether a shard's place is a URL, not a path."""
    return "://" in place


def without_secrets(place: str) -> str:
    """A shard's place, to be told: of a URL without user, password and query."""
    if not is_url(place):
        return place
    parts = urlsplit(place)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


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

    def open(self, url: str, sha256: str | None = None) -> int:
        """A file descriptor of the local copy of `url`, which is made first if need be.

        Call `closed` after closing it.

        Args:
            url: the remote shard.
            sha256: the digest that the copy must have, if known.

        Raises:
            UserError: the shard cannot be copied, or the copy has another digest.
        """
        path = self._path(url)
        while True:
            with suppress(FileNotFoundError):
                file = os.open(path, os.O_RDONLY)
                break
            with self._locked(path.name):
                if not path.exists():
                    _copy(url, path, sha256)
            # It may be gone again, removed by another process: then it is copied again.
        os.utime(file)
        self._opened[path.name] += 1
        with self._locked("evict"):
            self._evict(keep=path)
        return file

    def closed(self, url: str) -> None:
        """Say that a descriptor of `url` was closed."""
        self._opened[self._path(url).name] -= 1

    def _path(self, url: str) -> Path:
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        return self.cache_dir / f"{digest}-{Path(urlsplit(url).path).name}.copy"

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


def _copy(url: str, path: Path, sha256: str | None) -> None:
    digest, place = hashlib.sha256(), without_secrets(url)
    try:
        with replacing(path) as aside:
            with aside.open("wb") as out, webdataset.gopen(url, "rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
                    out.write(block)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise UserError(f"shard {place}: what arrived differs from what dataset.json names (SHA-256)")
    except (OSError, ValueError) as error:
        reason = str(error).replace(url, place)
        raise UserError(f"shard {place}: cannot be copied to {path.parent} ({reason})") from None
