"""The index of a data set's split: dense ids to (shard, offset, size, label), memory-mapped."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nldist.data.columns import numbers, read_columns
from nldist.data.remote import is_url
from nldist.errors import UserError
from nldist.files import replacing

FORMAT_VERSION = 1

RECORD = np.dtype(
    [
        ("offset", np.int64),
        ("size", np.int64),
        ("shard", np.int32),
        ("label", np.int32),
        ("crc32", np.uint32),
        ("height", np.int32),
        ("width", np.int32),
    ]
)
"""One image's row in the mapped file; `offset` and `size` are of the image's bytes inside its tar."""

_ROWS_PER_READ = 65_536


def owned(n: int, rank: int, size: int) -> range:
    """The ids, or positions, of `n` that `rank` of `size` owns: exact to one sample (docs/data.md)."""
    return range(rank * n // size, (rank + 1) * n // size)


class Index:
    """Where every image of one split lies, and its given label.

    The columns (of shape (N,), indexed by id) are read-only views of one memory-mapped file, `records`, that all
    processes of a node share. Pickling an index sends its place only; the process that unpickles it maps it again.
    """

    def __init__(
        self, root: Path, split: str, cache_dir: Path | None, labels_dir: Path | None, facts: dict[str, Any]
    ) -> None:
        self.root = root
        self.split = split
        self.name: str = facts["name"]
        self.classes: list[str] = facts["classes"]
        shards = facts["splits"][split]["shards"]
        self.shards: list[str] = [_resolve(root, shard["path"]) for shard in shards]
        self.shard_digests: list[str | None] = [shard.get("sha256") for shard in shards]
        self.shard_sizes: list[int | None] = [shard.get("num_bytes") for shard in shards]
        self._cache_dir, self._labels_dir = cache_dir, labels_dir
        self._parquet = root / split / "index.parquet"
        self._stamp = _stamp(self._parquet)
        self.records = self._map(facts["splits"][split]["num_samples"])

    @classmethod
    def open(
        cls, root: str | Path, split: str, cache_dir: str | Path | None = None, labels_dir: str | Path | None = None
    ) -> "Index":
        """Open the split `split` of the data set in the directory `root`.

        The first process to open a split writes its columns beside `index.parquet` as a file to be mapped, or into
        `cache_dir` where the data set is read-only. Label sets may also lie in `labels_dir`, laid out alike.

        Raises:
            UserError: there is no such data set or split, or its files contradict each other.
        """
        root = Path(root).absolute()
        facts = _read_facts(root)
        if split not in facts["splits"]:
            raise UserError(f"{root}: no split {split!r}; it has {', '.join(sorted(facts['splits']))}")
        cache, labels = (Path(directory).absolute() if directory else None for directory in (cache_dir, labels_dir))
        return cls(root, split, cache, labels, facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.root, self.split, self._cache_dir, self._labels_dir, self._stamp)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def offset(self) -> np.ndarray:
        """Where each image's bytes begin in its tar, int64 (N,)."""
        return self.records["offset"]

    @property
    def size(self) -> np.ndarray:
        """Number of bytes of each image's file, int64 (N,)."""
        return self.records["size"]

    @property
    def shard(self) -> np.ndarray:
        """Position of each image's shard in `shards`, int32 (N,)."""
        return self.records["shard"]

    @property
    def label(self) -> np.ndarray:
        """The given (noisy) labels, int32 (N,)."""
        return self.records["label"]

    @property
    def crc32(self) -> np.ndarray:
        """CRC-32 of each image's bytes, uint32 (N,)."""
        return self.records["crc32"]

    @property
    def height(self) -> np.ndarray:
        """Decoded height in pixels, int32 (N,)."""
        return self.records["height"]

    @property
    def width(self) -> np.ndarray:
        """Decoded width in pixels, int32 (N,)."""
        return self.records["width"]

    def keys(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The keys of `ids`, read from the parquet file (only the row groups that hold them)."""
        return _read_keys(self._parquet, np.asarray(ids, np.int64))

    def key_column(self) -> pa.ChunkedArray:
        """The keys of all samples, by id: text (N,), some 100 bytes each in memory."""
        return read_columns(self._parquet, ["key"])["key"]

    def key_batches(self, num_rows: int) -> Iterator[pa.Array]:
        """The same, some at a time: text (num_rows,), of the last ones less."""
        with pq.ParquetFile(self._parquet, pre_buffer=False, memory_map=True) as file:
            for batch in file.iter_batches(num_rows, columns=["key"], use_threads=False):
                yield batch.column("key")

    def label_sets(self) -> list[str]:
        """Names of the other label sets of this split."""
        return sorted({path.stem for path in self._label_files()})

    def _label_files(self) -> list[Path]:
        roots = filter(None, (self.root, self._labels_dir))
        return [path for root in roots for path in (root / self.split / "labels").glob("*.parquet")]

    def labels(self, name: str | None = None) -> np.ndarray:
        """Labels of all images, int32 (N,): the given ones, or those of the label set `name`.

        Raises:
            UserError: there is no such label set, or it is not complete and in the order of ids.
        """
        if name is None:
            return np.ascontiguousarray(self.label)
        paths = [path for path in self._label_files() if path.stem == name]
        if not paths:
            existing = ", ".join(self.label_sets()) or "none"
            raise UserError(f"{self.root}/{self.split}: no label set {name!r}; there are: {existing}")
        if len(paths) > 1:
            raise UserError(f"two label sets have the name {name!r}: {paths[0]} and {paths[1]}; rename one")
        return _read_labels(paths[0], len(self), self.num_classes)

    def _map(self, num_samples: int) -> np.ndarray:
        """The columns' file as a read-only array of RECORD, written first where there is none."""
        places = [(self._parquet.parent, ".index")]
        if self._cache_dir is not None:
            # That directory may serve several data sets, so there the data set's place is part of the name.
            place = hashlib.sha256(str(self._parquet).encode()).hexdigest()[:16]
            places.append((self._cache_dir, f"index-{place}"))
        paths = [directory / f"{prefix}-{self._stamp}.npy" for directory, prefix in places]
        path = next((path for path in paths if path.exists()), None) or self._write(paths)
        # A plain view: indexing a memmap takes twice as long.
        records = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        if len(records) != num_samples:
            raise UserError(
                f"{self._parquet} has {len(records)} rows, dataset.json says {num_samples} samples; "
                "write the data set again"
            )
        return records

    def _write(self, paths: list[Path]) -> Path:
        """Write the columns' file to the first of `paths` whose directory can be written to."""
        for path in paths:
            if not _can_be_written(path.parent):
                continue
            with replacing(path) as aside:
                _write_records(self._parquet, aside, self)
            for stale in path.parent.glob(path.name.replace(self._stamp, "*")):
                if stale != path:
                    stale.unlink(missing_ok=True)
            return path
        raise UserError(
            f"{paths[0].parent} is read-only: set data.cache_dir to a directory on this node (noise: --labels-dir)"
        )


def _read_labels(path: Path, num_samples: int, num_classes: int) -> np.ndarray:
    table = read_columns(path, ["id", "label"])
    ids, labels = numbers(table.column("id")), numbers(table.column("label"))
    if not np.array_equal(ids, np.arange(num_samples)):
        raise UserError(f"{path}: must hold every id from 0 to {num_samples - 1} once, in order")
    _check_range(path, "label", labels, num_classes)
    return labels.astype(np.int32)


def _reopen(root: Path, split: str, cache_dir: Path | None, labels_dir: Path | None, stamp: str) -> Index:
    index = Index.open(root, split, cache_dir, labels_dir)
    if index._stamp != stamp:
        raise UserError(f"{root}/{split}: the data set was written again while it was in use; start the run anew")
    return index


def _resolve(root: Path, path: str) -> str:
    """An absolute path, or a URL as it is."""
    return path if is_url(path) else str(root / path)


def _stamp(path: Path) -> str:
    """A name for this state of the file, which changes when it is written again."""
    try:
        facts = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; write the data set again") from error
    text = f"{FORMAT_VERSION} {RECORD} {facts.st_size} {facts.st_mtime_ns}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_facts(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    try:
        facts = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; is {root} a sharded data set?") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    try:
        version = facts["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version!r}; this nldist reads version {FORMAT_VERSION}")
        _ = facts["name"], len(facts["classes"])
        for split in facts["splits"].values():
            _ = split["num_samples"], [shard["path"] for shard in split["shards"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: incomplete ({type(error).__name__}: {error}); write the data set again") from error
    return dict(facts)


def _read_keys(parquet: Path, wanted: np.ndarray) -> list[str]:
    """The keys of the ids `wanted`, from the row groups that hold them."""
    with pq.ParquetFile(parquet) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(rows, dtype=np.int64)
        groups = np.unique(np.searchsorted(ends, wanted, side="right"))
        column = file.read_row_groups(groups.tolist(), columns=["key"])["key"]
    ids = np.concatenate(
        [np.empty(0, np.int64), *(np.arange(ends[group] - rows[group], ends[group]) for group in groups)]
    )
    keys: list[str] = column.take(pa.array(np.searchsorted(ids, wanted))).to_pylist()
    return keys


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _write_records(parquet: Path, target: Path, index: Index) -> None:
    """Write the columns of `parquet` to the .npy file `target`, a batch of rows at a time, checking them."""
    names = list(RECORD.names or ())
    try:
        with pq.ParquetFile(parquet, memory_map=True) as file:
            num_rows = file.metadata.num_rows
            out = np.lib.format.open_memmap(target, "w+", RECORD, (num_rows,))
            row = 0
            for batch in file.iter_batches(_ROWS_PER_READ, columns=["id", *names], use_threads=False):
                ids = numbers(batch.column("id"))
                if not np.array_equal(ids, np.arange(row, row + len(ids))):
                    raise UserError(f"{parquet}: ids must be 0 to {num_rows - 1} in order")
                for name in names:
                    out[name][row : row + len(ids)] = numbers(batch.column(name))
                row += len(ids)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{parquet}: cannot be read as an index ({error})") from error
    _check_range(parquet, "label", out["label"], index.num_classes)
    _check_range(parquet, "shard", out["shard"], len(index.shards))
    out.flush()
    pa.default_memory_pool().release_unused()


def _check_range(path: Path, name: str, values: np.ndarray, end: int) -> None:
    if len(values) and (values.min() < 0 or values.max() >= end):
        raise UserError(f"{path}: {name} must be in 0..{end - 1}, found {values.min()}..{values.max()}")
