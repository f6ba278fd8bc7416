"""Raw images to WebDataset shards: parallel, restartable, the same bytes whatever the number of workers."""

import hashlib
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from nldist.data.index import Index
from nldist.data.labels import CLEAN, transition_table, write_label_set
from nldist.data.make.build import Build
from nldist.data.make.finish import Rejected, ShardFacts, Summary, finish
from nldist.data.make.images import BadImageError, Check, Limits, normalise
from nldist.data.make.keys import keys_of, readable
from nldist.data.make.parallel import run_jobs
from nldist.data.make.shards import ShardWriter
from nldist.data.make.sources.base import Listing, Source
from nldist.data.manifest import writing
from nldist.errors import UserError


@dataclass(frozen=True)
class WriteOptions:
    """How shards are written.

    `shard_size` images go into a shard (fewer if some are refused), in a random order given by `seed`.
    Images with a short side above `resize` pixels are shrunk to it. JPEGs that stay as they are are decoded to `check`
    them, or not. `num_workers` processes, 0 for none. Bad images are left out with `on_bad` "skip"; with "refuse" they
    end the run. `name` is the data set's.
    """

    shard_size: int = 2000
    seed: int = 0
    resize: int | None = None
    check: Check = "decode"
    limits: Limits = field(default_factory=Limits)
    on_bad: str = "refuse"
    num_workers: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.num_workers < 0 or (self.resize is not None and self.resize < 1):
            raise UserError("shard size and resize must be at least 1, workers at least 0")


class Found(NamedTuple):
    """The images of a split in the order of their paths, what their source says of them, and the plan."""

    table: pa.Table
    listing: Listing
    plan: dict[str, object]


@dataclass(frozen=True)
class SplitWriter:
    """The writing of a split's shards from a source. Small and picklable: it goes to every process that writes some.

    On several machines one begins, each writes shards of its own, and when all are there one finishes.
    """

    source: Source
    build: Build
    options: WriteOptions

    def find(self) -> Found:
        """List the images. Raises UserError if they cannot be a split."""
        listing = self.source.listing()
        table = _with_keys(_sorted(listing))
        return Found(table, listing, _plan(self.source, table, listing.classes, self.options))

    def begin(self, found: Found) -> Summary | None:
        """Start or go on; returns the summary if the split is complete. Only where the build is claimed."""
        table, listing, plan = found
        if not self.build.begin(plan, listing.classes):
            summary = self.build.complete_summary()
            self._write_clean(table, summary)  # a kill may have left it without
            return summary
        order = np.random.default_rng(self.options.seed).permutation(table.num_rows)
        listed = self.build.listed
        listed.save(table, order, self.options.shard_size, listing.classes, listing.notes)
        for number in range(len(listed.facts().sizes)):
            if not self.build.is_settled(number, self.options.on_bad):
                self.build.forget_shard(number)
        return None

    def missing(self, numbers: Iterable[int] | None = None) -> dict[int, int]:
        """Those of these shards (or of all) that are missing, and how many images each is made of.

        Raises:
            UserError: somebody has removed what was begun.
        """
        if not self.build.listed.file.exists():
            self.build.complete_summary()
            return {}
        sizes = self.build.listed.facts().sizes
        numbers = range(len(sizes)) if numbers is None else numbers
        return {number: sizes[number] for number in numbers if self.build.load_facts(number) is None}

    def write(self, numbers: Iterable[int]) -> Iterator[int]:
        """Write these shards; yields the number of images looked at for each, as they are done."""
        return run_jobs(partial(write_shard, self), numbers, self.options.num_workers)

    def resume(self) -> Summary:
        """Write what is missing and finish; or only tell, if that was done before. Only where the build is claimed.

        Raises:
            UserError: as `write_split`, or somebody has removed what was begun.
        """
        if not self.build.listed.file.exists():
            return self.build.complete_summary()
        for _ in self.write(self.missing()):
            pass
        return self.finish()

    def finish(self) -> Summary:
        """Make a split of all shards. Only where the build is claimed."""
        build, options = self.build, self.options
        table, facts = build.listed.read()
        shards = build.shards(len(facts.sizes))
        summary = finish(build.root, build.split, shards, facts.classes, options.name, options.on_bad)
        summary.notes[:0] = facts.notes
        self._write_clean(table, summary)
        build.clear()
        return summary

    def _write_clean(self, table: pa.Table, summary: Summary) -> None:
        """Write the column clean, if there is one, as a label set, and note how the given labels differ from it."""
        if CLEAN not in table.column_names:
            return
        root, split = self.build.root, self.build.split
        index = Index.open(root, split)
        rows = pc.index_in(index.key_column().cast(pa.large_string()), value_set=table["key"])
        clean = table[CLEAN].take(rows).to_numpy()
        write_label_set(root, split, CLEAN, clean)
        num_wrong = np.count_nonzero(index.label != clean)
        share = 100 * num_wrong / len(index)
        matrix = textwrap.indent(transition_table(clean, index.label, index.classes), "  ")
        differ = f"{num_wrong:,} of {len(index):,} given labels ({share:.2f} %) differ from it"
        summary.notes.append(f"label set {CLEAN}: {differ}\n{matrix}")


def write_split(source: Source, root: Path, split: str, options: WriteOptions) -> Summary:
    """Write the images of `source` as ROOT/SPLIT, or go on where an earlier run was stopped.

    Raises:
        UserError: bad images under "refuse", other input than the earlier run's, or other trouble that
            the user can put right. Finished shards are kept.
    """
    writer = SplitWriter(source, Build(root, split), options)
    found = writer.find()
    with writer.build.claimed():
        summary = writer.begin(found)
        if summary is not None:
            return summary
        del found  # gigabytes, which are on disk now
        missing, num_images = writer.missing(), sum(writer.build.listed.facts().sizes)
        num_new = sum(missing.values())
        with tqdm(total=num_images, initial=num_images - num_new, unit=" images", desc=split, mininterval=1.0) as bar:
            for num_looked_at in writer.write(missing):
                bar.update(num_looked_at)
        return replace(writer.finish(), num_new=num_new)


def write_shard(writer: SplitWriter, number: int) -> int:
    """Write one shard and its sidecar, and return the number of images looked at."""
    source, build, options = writer.source, writer.build, writer.options
    rows = build.listed.rows(number)
    records, rejected = [], []
    path = build.shard_path(number)
    build.remove_stale(path)
    with writing(path) as aside, aside.open("wb") as file:
        shard = ShardWriter(file)
        for raw_path, key, label in zip(*(rows[name].to_pylist() for name in ("path", "key", "label")), strict=True):
            try:
                raw = source.read(raw_path, options.limits.max_bytes)
                image = normalise(raw, options.limits, options.resize, options.check)
            except (BadImageError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                rejected.append(Rejected(readable(raw_path), reason))
            else:
                records.append(shard.add(key, image, label))
        num_bytes, sha256 = shard.close()
    name = str(path.relative_to(build.root))
    build.save_shard(number, records, ShardFacts(name, len(records), num_bytes, sha256, rejected))
    return int(rows.num_rows)


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
        **({} if options.check == "decode" else {"check": options.check}),
    }
