"""WebDataset tars that somebody else wrote, indexed where they are: nothing is copied or converted."""

import glob
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from nldist.data.make.build import Build
from nldist.data.make.finish import Record, Rejected, ShardFacts, Summary, finish
from nldist.data.make.images import Limits
from nldist.data.make.meaning import Meaning, Reading, meaning
from nldist.data.make.parallel import run_jobs
from nldist.data.make.samples import BadSample, Keys, Rules, samples
from nldist.data.make.tars import DamagedTarError, TarReader
from nldist.data.manifest import known_classes
from nldist.data.remote import is_url, scheme_of, without_secrets
from nldist.errors import UserError

READS = ("num_shards", "label_key", "image_key", "keys", "max_pixels", "max_bytes")
"""What, of a plan, decides what is noted of a tar; labels get their meaning at the end."""


@dataclass(frozen=True)
class IndexOptions:
    """How foreign tars are indexed.

    Labels and images are found by the rules of `nldist.data.make.samples`, and mean what
    `nldist.data.make.meaning` says. The rest as in `WriteOptions`.
    """

    label_key: str | None = None
    classes: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    on_bad: str = "refuse"
    num_workers: int = 0
    name: str | None = None
    reading: Reading | None = None
    image_key: str | None = None
    keys: Keys = "webdataset"


class TarJob(NamedTuple):
    """One tar, by its place in the data set's list of shards."""

    number: int
    path: str


def index_tars(pattern: str, root: Path, split: str, options: IndexOptions) -> Summary:
    """Make the tars that match `pattern` the split of a data set, or go on where an earlier run was stopped.

    `pattern` is a glob of local files, or a URL; both may have brace ranges such as {0000..0099}.

    Raises:
        UserError: as `write_split`.
    """
    build = Build(root, split)
    paths = _expand(pattern)
    classes = list(options.classes or known_classes(root, split) or ()) or None
    plan = _plan(paths, list(options.classes or ()), options)
    if not build.has_plan(plan):  # else it was begun before the data set had classes
        plan = _plan(paths, classes or [], options)
    with build.claimed():
        if not build.begin(plan, classes, READS):
            return build.complete_summary()
        _index_shards(build, paths, options)

        def meaning_of(labels: list[str]) -> Meaning:
            known = classes or known_classes(root, split)  # another command may have made its split meanwhile
            return meaning(pattern, labels, known, options.reading)

        summary = finish(root, split, build.shards(len(paths)), meaning_of, options.name, options.on_bad)
        build.clear()
    return summary


def _index_shards(build: Build, paths: list[str], options: IndexOptions) -> None:
    """Index the tars that are missing."""
    jobs = [TarJob(number, path) for number, path in enumerate(paths)]
    todo = [job for job in jobs if not build.is_settled(job.number, options.on_bad, _place(job.path, build.root))]
    work = partial(index_tar, build, _rules(options))
    done = len(paths) - len(todo)
    with tqdm(total=len(paths), initial=done, unit=" tars", desc=build.split, mininterval=1.0) as bar:
        for num_images in run_jobs(work, todo, options.num_workers):
            bar.update()
            bar.set_postfix_str(f"{num_images:,} images in the last")


def index_tar(build: Build, rules: Rules, job: TarJob) -> int:
    """Write the sidecar of one tar, and return the number of its samples."""
    records: list[Record] = []
    rejected: list[Rejected] = []
    labels: dict[str, int] = {}
    place = without_secrets(job.path)
    try:
        with TarReader(job.path) as tar:
            try:
                for sample in samples(tar, rules):
                    if isinstance(sample, BadSample):
                        rejected.append(Rejected(f"{place}:{sample.key}", sample.reason))
                        continue
                    offset, size, *rest = sample.image
                    label = labels.setdefault(sample.label, len(labels))
                    records.append(Record(sample.key, offset, size, label, *rest))
            except DamagedTarError as error:
                rejected.append(Rejected(place, str(error)))
            facts = ShardFacts(_place(job.path, build.root), len(records), tar.num_bytes, tar.sha256, rejected)
    except OSError as error:
        raise UserError(f"cannot open {place}: {error.strerror or error}") from None
    build.save_shard(job.number, records, facts, list(labels))
    return len(records) + len(rejected)


def _rules(options: IndexOptions) -> Rules:
    image_key = options.image_key and options.image_key.lower().removeprefix(".")
    return Rules(options.label_key, image_key, options.keys, options.limits)


def _expand(pattern: str) -> list[str]:
    """The tars that a pattern names.

    Raises:
        UserError: a part of it names none, or one is named twice.
    """
    paths: list[str] = []
    for part in _parts(pattern):
        if part.startswith("pipe:"):
            raise UserError(f"{part}: a command is no data; give files or URLs")
        if is_url(part):
            scheme_of(part)
        found = [part] if is_url(part) else sorted(glob.glob(_literal(os.path.abspath(part))))
        if not found:
            raise UserError(f"no file matches {part}" + (f", a part of {pattern}" if part != pattern else ""))
        paths += found
    if len(set(paths)) < len(paths):
        raise UserError(f"{pattern} names a file twice")
    return paths


def _parts(pattern: str) -> list[str]:
    """A pattern without its braces, unless there is a file of this very name."""
    from braceexpand import braceexpand

    if os.path.exists(pattern):
        return [pattern]
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{pattern}: {error}") from None


def _literal(pattern: str) -> str:
    """A glob whose leading directories stand for themselves where they exist, whatever signs are in their names."""
    if os.path.exists(pattern) or os.path.dirname(pattern) == pattern:
        return glob.escape(pattern)
    folder, name = os.path.split(pattern)
    return os.path.join(_literal(folder), name)


def _plan(paths: list[str], classes: list[str], options: IndexOptions) -> dict[str, object]:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for path in paths:
        size = "" if is_url(path) else os.stat(path).st_size
        digest.update(f"{path}\0{size}\0".encode())
    added = {"labels": options.reading, "image_key": options.image_key, "keys": options.keys}
    return {
        "source": "webdataset",
        "num_shards": len(paths),
        "listing": digest.hexdigest(),
        "label_key": options.label_key,
        **asdict(options.limits),
        **{name: value for name, value in added.items() if value not in (None, "webdataset")},
    }


def _place(path: str, root: Path) -> str:
    """The path as dataset.json has it: relative for a tar inside the data set, so that it can be moved."""
    inside = not is_url(path) and Path(path).is_relative_to(root.resolve())
    return str(Path(path).relative_to(root.resolve())) if inside else path
