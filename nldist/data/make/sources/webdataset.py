"""WebDataset tars that somebody else wrote, indexed where they are: nothing is copied or converted."""

import glob
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nldist.data.make.build import Build, Record, Rejected, ShardFacts, Summary
from nldist.data.make.images import BadImageError, Limits, decoded_size
from nldist.data.make.parallel import run_jobs
from nldist.data.make.tars import IMAGE_EXTENSIONS, DamagedTarError, Member, TarReader
from nldist.data.manifest import known_classes
from nldist.errors import UserError


@dataclass(frozen=True)
class IndexOptions:
    """How foreign tars are indexed.

    Labels come from KEY.cls, or from the entry `label_key` of KEY.json; they are class indices, or names of
    `classes`. Without `classes` the labels are named by their numbers. The rest as in `WriteOptions`.
    """

    label_key: str | None = None
    classes: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    on_bad: str = "refuse"
    num_workers: int = 0
    name: str | None = None


class TarJob(NamedTuple):
    """One tar, by its place in the data set's list of shards."""

    number: int
    path: str


@dataclass
class _Sample:
    key: str
    image: Member | None = None
    data: bytes = b""
    label: bytes | None = None
    too_large: bool = False


def index_tars(pattern: str, root: Path, split: str, options: IndexOptions) -> Summary:
    """Make the tars that match `pattern` the split of a data set, or go on where an earlier run was stopped.

    `pattern` is a glob of local files, or a URL; both may have brace ranges such as {0000..0099}.

    Raises:
        UserError: as `write_split`.
    """
    build = Build(root, split)
    paths = _expand(pattern)
    classes = options.classes or known_classes(root, split)
    if not build.begin(_plan(paths, classes, options), None if classes is None else list(classes)):
        return build.complete_summary()
    todo = [TarJob(n, path) for n, path in enumerate(paths) if not build.is_settled(n, options.on_bad)]
    work = partial(index_tar, build, options, None if classes is None else tuple(classes))
    with tqdm(total=len(paths), initial=len(paths) - len(todo), unit=" tars", desc=split, mininterval=1.0) as bar:
        for num_images in run_jobs(work, todo, options.num_workers):
            bar.update()
            bar.set_postfix_str(f"{num_images:,} images in the last")
    return build.finish(len(paths), None if classes is None else list(classes), options.name, options.on_bad)


def index_tar(build: Build, options: IndexOptions, classes: tuple[str, ...] | None, job: TarJob) -> int:
    """Write the sidecar of one tar, and return the number of its samples."""
    records: list[Record] = []
    rejected: list[Rejected] = []
    try:
        with TarReader(job.path) as tar:
            try:
                for sample in _samples(tar, options):
                    try:
                        records.append(_record(sample, options, classes))
                    except BadImageError as error:
                        rejected.append(Rejected(f"{job.path}:{sample.key}", str(error)))
            except DamagedTarError as error:
                rejected.append(Rejected(job.path, str(error)))
            facts = ShardFacts(_place(job.path, build.root), len(records), tar.num_bytes, tar.sha256, rejected)
    except OSError as error:
        raise UserError(f"cannot open {job.path}: {error.strerror or error}") from None
    build.save_shard(job.number, records, facts)
    return len(records) + len(rejected)


def _samples(tar: TarReader, options: IndexOptions) -> Iterator[_Sample]:
    """Group consecutive members by key, as WebDataset does."""
    label_extension = "cls" if options.label_key is None else "json"
    sample: _Sample | None = None
    for member in tar:
        if not member.extension or member.name.startswith("__"):
            continue
        if sample is None or sample.key != member.key:
            if sample is not None:
                yield sample
            sample = _Sample(member.key)
        if member.extension == label_extension:
            sample.label = member.read()
        elif member.extension in IMAGE_EXTENSIONS and sample.image is None:
            sample.image = member
            sample.too_large = member.size > options.limits.max_bytes
            sample.data = b"" if sample.too_large else member.read()
    if sample is not None:
        yield sample


def _record(sample: _Sample, options: IndexOptions, classes: tuple[str, ...] | None) -> Record:
    if sample.image is None:
        raise BadImageError(f"no image (looked for {', '.join(IMAGE_EXTENSIONS)})")
    if sample.too_large:
        raise BadImageError(f"{sample.image.size:,} bytes are more than the limit of {options.limits.max_bytes:,}")
    label = _label(sample.label, options.label_key, classes)
    height, width = decoded_size(sample.data, options.limits)
    offset, size = sample.image.offset, sample.image.size
    return Record(sample.key, offset, size, label, zlib.crc32(sample.data), height, width)


def _label(text: bytes | None, label_key: str | None, classes: tuple[str, ...] | None) -> int:
    value: Any = text
    if text is None:
        raise BadImageError(f"no label (looked for .{'cls' if label_key is None else 'json'})")
    try:
        value = text.decode().strip() if label_key is None else json.loads(text)[label_key]
        if classes is not None and value in classes:
            return classes.index(value)
        label = int(value)
    except (ValueError, KeyError, TypeError):
        raise BadImageError(f"no usable label: {value!r:.60}") from None
    if not 0 <= label < (2**31 if classes is None else len(classes)):
        raise BadImageError(f"label {label} is out of range")
    return label


def _expand(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    paths: list[str] = []
    for part in braceexpand(pattern):
        if part.startswith("pipe:"):
            raise UserError(f"{part}: a command is no data; give files or URLs")
        paths += [part] if "://" in part else sorted(glob.glob(os.path.abspath(part)))
    if not paths:
        raise UserError(f"no file matches {pattern}")
    if len(set(paths)) < len(paths):
        raise UserError(f"{pattern} names a file twice")
    return paths


def _plan(paths: list[str], classes: Any, options: IndexOptions) -> dict[str, object]:
    digest = hashlib.sha256(json.dumps(list(classes or ())).encode())
    for path in paths:
        size = "" if "://" in path else os.stat(path).st_size
        digest.update(f"{path}\0{size}\0".encode())
    return {
        "source": "webdataset",
        "num_shards": len(paths),
        "listing": digest.hexdigest(),
        "label_key": options.label_key,
        **asdict(options.limits),
    }


def _place(path: str, root: Path) -> str:
    """The path as dataset.json has it: relative for a tar inside the data set, so that it can be moved."""
    inside = "://" not in path and Path(path).is_relative_to(root.resolve())
    return str(Path(path).relative_to(root.resolve())) if inside else path
