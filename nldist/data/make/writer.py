"""Raw images to WebDataset shards: parallel, restartable, the same bytes whatever the number of workers."""

import hashlib
import tarfile
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from nldist.data.index import Index
from nldist.data.labels import CLEAN, transition_table, write_label_set
from nldist.data.make.build import Build
from nldist.data.make.finish import Record, Rejected, ShardFacts, Summary, finish
from nldist.data.make.images import BadImageError, Encoded, Limits, normalise
from nldist.data.make.keys import keys_of, readable
from nldist.data.make.parallel import run_jobs
from nldist.data.make.sources.base import Listing, Source
from nldist.data.manifest import writing
from nldist.errors import UserError

COLUMNS = ("path", "key", "label")
"""What of a listing a shard is made of."""


@dataclass(frozen=True)
class WriteOptions:
    """How shards are written.

    `shard_size` images go into a shard (fewer if some are refused), in a random order given by `seed`.
    Images with a short side above `resize` pixels are shrunk to it. `num_workers` processes, 0 for none. Bad
    images are left out with `on_bad` "skip"; with "refuse" they end the run. `name` is the data set's.
    """

    shard_size: int = 2000
    seed: int = 0
    resize: int | None = None
    limits: Limits = field(default_factory=Limits)
    on_bad: str = "refuse"
    num_workers: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.num_workers < 0 or (self.resize is not None and self.resize < 1):
            raise UserError("shard size and resize must be at least 1, workers at least 0")


class ShardJob(NamedTuple):
    """The rows (path, key, label) that go into shard `number`, in order."""

    number: int
    rows: pa.Table


def write_split(source: Source, root: Path, split: str, options: WriteOptions) -> Summary:
    """Write the images of `source` as ROOT/SPLIT, or go on where an earlier run was stopped.

    Raises:
        UserError: bad images under "refuse", other input than the earlier run's, or other trouble that
            the user can put right. Finished shards are kept.
    """
    build = Build(root, split)
    listing = source.listing()
    table = _with_keys(_sorted(listing))
    with build.claimed():
        if build.begin(_plan(source, table, listing.classes, options), listing.classes):
            num_shards = _write_shards(source, build, table, options)
            summary = finish(root, split, build.shards(num_shards), listing.classes, options.name, options.on_bad)
            build.clear()
            summary.notes[:0] = listing.notes
        else:
            summary = build.complete_summary()
        if CLEAN in table.column_names:  # also if it was complete: a kill may have left it without
            summary.notes.append(_write_clean(root, split, table))
    return summary


def _write_clean(root: Path, split: str, table: pa.Table) -> str:
    """Write the column clean as a label set, and say how the given labels differ from it."""
    index = Index.open(root, split)
    rows = pc.index_in(index.key_column().cast(pa.large_string()), value_set=table["key"])
    clean = table[CLEAN].take(rows).to_numpy()
    write_label_set(root, split, CLEAN, clean)
    num_wrong = np.count_nonzero(index.label != clean)
    share = 100 * num_wrong / len(index)
    matrix = textwrap.indent(transition_table(clean, index.label, index.classes), "  ")
    return f"label set {CLEAN}: {num_wrong:,} of {len(index):,} given labels ({share:.2f} %) differ from it\n{matrix}"


def _write_shards(source: Source, build: Build, table: pa.Table, options: WriteOptions) -> int:
    """Write the shards that are missing, and return how many there are."""
    order = np.random.default_rng(options.seed).permutation(table.num_rows)
    num_shards: int = -(-table.num_rows // options.shard_size)
    todo = [number for number in range(num_shards) if not build.is_settled(number, options.on_bad)]

    def jobs() -> Iterator[ShardJob]:
        for number in todo:
            rows = order[number * options.shard_size : (number + 1) * options.shard_size]
            yield ShardJob(number, table.select(COLUMNS).take(rows))

    work = partial(write_shard, source, build, options.limits, options.resize)
    num_left = sum(min(options.shard_size, table.num_rows - number * options.shard_size) for number in todo)
    num_done = table.num_rows - num_left
    with tqdm(total=table.num_rows, initial=num_done, unit=" images", desc=build.split, mininterval=1.0) as bar:
        for num_images in run_jobs(work, jobs(), options.num_workers):
            bar.update(num_images)
    return num_shards


def write_shard(source: Source, build: Build, limits: Limits, resize: int | None, job: ShardJob) -> int:
    """Write one shard and its sidecar, and return the number of images looked at."""
    records, rejected = [], []
    path = build.shard_path(job.number)
    with writing(path) as aside, aside.open("wb") as file:
        shard = ShardWriter(file)
        for row in zip(*(column.to_pylist() for column in job.rows.columns), strict=True):
            raw_path, key, label = row
            try:
                image = normalise(source.read(raw_path, limits.max_bytes), limits, resize)
            except (BadImageError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                rejected.append(Rejected(readable(raw_path), reason))
            else:
                records.append(shard.add(key, image, label))
        num_bytes, sha256 = shard.close()
    name = str(path.relative_to(build.root))
    build.save_shard(job.number, records, ShardFacts(name, len(records), num_bytes, sha256, rejected))
    return len(job.rows)


class ShardWriter:
    """A WebDataset tar whose bytes depend on nothing but the samples."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def add(self, key: str, image: Encoded, label: int) -> Record:
        """Append KEY.EXTENSION and KEY.cls."""
        offset = self._append(f"{key}.{image.extension}", image.data)
        self._append(f"{key}.cls", b"%d" % label)
        return Record(key, offset, len(image.data), label, zlib.crc32(image.data), image.height, image.width)

    def close(self) -> tuple[int, str]:
        """End the archive and return its number of bytes and SHA-256."""
        end = self._num_bytes + 2 * tarfile.BLOCKSIZE
        self._write(bytes(-(-end // tarfile.RECORDSIZE) * tarfile.RECORDSIZE - self._num_bytes))
        return self._num_bytes, self._digest.hexdigest()

    def _append(self, name: str, data: bytes) -> int:
        """Append a member and return the offset of its data."""
        member = tarfile.TarInfo(name)  # time, owner and group are 0 or empty by default
        member.size = len(data)
        self._write(member.tobuf(tarfile.PAX_FORMAT))
        offset = self._num_bytes
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._num_bytes += len(data)


def _sorted(listing: Listing) -> pa.Table:
    table, num_classes = listing.table, len(listing.classes)
    if table.num_rows == 0:
        raise UserError("the source lists no images")
    if len(set(listing.classes)) < num_classes:
        raise UserError("two classes have the same name")
    lowest, highest = pc.min_max(table["label"]).as_py().values()
    if lowest < 0 or highest >= num_classes:
        raise UserError(f"labels run from {lowest} to {highest}, but there are {num_classes} classes (from 0)")
    order = pc.sort_indices(table, sort_keys=[("path", "ascending"), ("label", "ascending")])
    return table.take(order).combine_chunks()


def _with_keys(table: pa.Table) -> pa.Table:
    """Insert the column key between path and label."""
    keys = keys_of(table["path"].combine_chunks())
    return table.add_column(1, "key", keys)


def _plan(source: Source, table: pa.Table, classes: list[str], options: WriteOptions) -> dict[str, object]:
    """What the shards' bytes depend on: not where the raw images lie, nor what is done with bad ones."""
    digest = hashlib.sha256("\n".join(classes).encode())
    for batch in table.to_batches(max_chunksize=100_000):
        digest.update(b"\0".join(batch["path"].to_pylist()))
        digest.update(np.ascontiguousarray(batch["label"].to_numpy()).astype("<i4").tobytes())
    return {
        "source": source.kind,
        "num_images": table.num_rows,
        "listing": digest.hexdigest(),
        "shard_size": options.shard_size,
        "seed": options.seed,
        "resize": options.resize,
        **asdict(options.limits),
    }
