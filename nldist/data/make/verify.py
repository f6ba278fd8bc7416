"""Check a data set on disk against everything that its format promises."""

import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from nldist.data.make.finish import RECORD, Record
from nldist.data.make.images import BadImageError, Limits, decoded_size
from nldist.data.make.meaning import could_be, names_of
from nldist.data.make.parallel import run_jobs
from nldist.data.make.tars import IMAGE_EXTENSIONS, DamagedTarError, Member, TarReader, split_name
from nldist.data.manifest import read_dataset
from nldist.data.remote import is_url, without_secrets
from nldist.errors import UserError

INDEX_SCHEMA = {"id": pa.int64(), "shard": pa.int32(), **{field.name: field.type for field in RECORD}}
LABEL_SCHEMA = {"id": pa.int64(), "label": pa.int32()}
SHARD_FIELDS = {"path": str, "num_samples": int, "num_bytes": int, "sha256": str}
NO_LIMITS = Limits(max_pixels=2**62, max_bytes=2**62)  # sharding has let these images in


class Problem(NamedTuple):
    """One thing that is off: where (split, then file or shard), which sample if it is one, and what."""

    place: str
    sample: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.place}: " + ("" if self.sample is None else f"id {self.sample}: ") + self.what


@dataclass(frozen=True)
class Report:
    """What was looked at, and what is off."""

    num_samples: int
    num_shards: int
    problems: list[Problem]


class ShardJob(NamedTuple):
    """One shard as dataset.json has it, and its rows of the index.

    In a shard of ours a label is a class's index; in any other what `classes` and `nldist.data.make.meaning` say, or
    (None) not in .cls.
    """

    place: str
    path: str
    is_ours: bool
    classes: list[str] | None
    num_bytes: int
    sha256: str
    rows: pa.Table


def verify(root: Path, num_workers: int = 0) -> Report:
    """Check every split of a data set: files, checksums, index, images, labels, label sets.

    Raises:
        UserError: `root` is not a data set at all.
    """
    dataset = read_dataset(root)
    problems = [Problem("dataset.json", None, what) for what in _dataset_problems(dataset)]
    if problems:
        return Report(0, 0, problems)
    num_samples = num_shards = 0
    for split, entry in dataset["splits"].items():
        found = list(_split_problems(root, split, entry, dataset["classes"], num_workers))
        problems += sorted(found, key=lambda problem: (problem.place, problem.sample or 0))
        num_samples += entry["num_samples"]
        num_shards += len(entry["shards"])
    return Report(num_samples, num_shards, problems)


def _dataset_problems(dataset: dict[str, Any]) -> Iterator[str]:
    classes, splits = dataset.get("classes"), dataset.get("splits")
    if not isinstance(dataset.get("name"), str):
        yield "'name' is no text"
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        yield "'classes' is no list of names"
    elif len(set(classes)) < len(classes):
        yield "'classes' has a name twice"
    if not isinstance(splits, dict) or not splits:
        yield "'splits' is empty or no object"
        return
    for name, entry in splits.items():
        yield from _entry_problems(name, entry)


def _entry_problems(name: str, entry: Any) -> Iterator[str]:
    try:
        fits = all(type(shard[field]) is kind for shard in entry["shards"] for field, kind in SHARD_FIELDS.items())
        total = sum(shard["num_samples"] for shard in entry["shards"])
        stated = entry["num_samples"]
    except (KeyError, TypeError) as error:
        yield f"split '{name}' is malformed: {error!r}"
        return
    if not fits:
        yield f"split '{name}' has a shard with a field of the wrong type"
    elif total != stated:
        yield f"split '{name}' states {stated} samples, its shards {total}"


def _split_problems(
    root: Path, split: str, entry: dict[str, Any], classes: list[str], num_workers: int
) -> Iterator[Problem]:
    place, num_classes = f"{split}/index.parquet", len(classes)
    table = _read(root / split / "index.parquet", INDEX_SCHEMA)
    if isinstance(table, str):
        yield Problem(place, None, table)
        return
    for what in _index_problems(table, entry):
        yield Problem(place, None, what)
    yield from _labels_problems(place, table, num_classes)
    for path in sorted((root / split / "labels").glob("*.parquet")):
        yield from _label_set_problems(f"{split}/labels/{path.name}", path, entry["num_samples"], num_classes)
    with tqdm(total=table.num_rows, unit=" images", desc=split, mininterval=1.0) as bar:
        for num_images, problems in run_jobs(_shard_problems, _jobs(root, split, entry, table, classes), num_workers):
            bar.update(num_images)
            yield from problems


def _jobs(root: Path, split: str, entry: dict[str, Any], table: pa.Table, classes: list[str]) -> Iterator[ShardJob]:
    labels = None if _label_key(root / split / "plan.json") else classes
    shard_of_row = table["shard"].to_numpy()
    for number, shard in enumerate(entry["shards"]):
        path, ours = shard["path"], Path(shard["path"]).parent == Path(split)
        rows = table.take(np.flatnonzero(shard_of_row == number))
        where = path if is_url(path) else str(root / path)
        yield ShardJob(
            f"{split}: {without_secrets(path)}", where, ours, labels, shard["num_bytes"], shard["sha256"], rows
        )


def _label_key(plan: Path) -> Any:
    """The entry of .json that holds the labels, None if .cls does."""
    try:
        return json.loads(plan.read_text(encoding="utf-8")).get("label_key")
    except (OSError, ValueError, AttributeError):
        return None


def _read(path: Path, schema: dict[str, pa.DataType]) -> pa.Table | str:
    """The columns of `schema`, or what is wrong with the file."""
    try:
        table = pq.read_table(path, columns=list(schema))
    except FileNotFoundError:
        return "is missing"
    except (OSError, pa.ArrowException) as error:
        return f"cannot be read: {error}"
    for name, kind in schema.items():
        if name not in table.column_names:
            return f"has no column '{name}'"
        if table[name].type != kind or table[name].null_count:
            return f"column '{name}' must be {kind} without nulls"
    return table


def _index_problems(table: pa.Table, entry: dict[str, Any]) -> Iterator[str]:
    if table.num_rows != entry["num_samples"]:
        yield f"has {table.num_rows} rows, dataset.json states {entry['num_samples']} samples"
    if not np.array_equal(table["id"].to_numpy(), np.arange(table.num_rows)):
        yield "ids are not 0, 1, 2, ... in order"
    if pc.count_distinct(table["key"]).as_py() < table.num_rows:
        yield "a key occurs twice"
    shards = table["shard"].to_numpy()
    if len(shards) and (shards.min() < 0 or shards.max() >= len(entry["shards"]) or (np.diff(shards) < 0).any()):
        yield "shard numbers are out of range or not ascending"
        return
    counts = np.bincount(shards, minlength=len(entry["shards"]))
    for number, shard in enumerate(entry["shards"]):
        if counts[number] != shard["num_samples"]:
            place = without_secrets(shard["path"])
            yield f"has {counts[number]} rows of {place}, dataset.json states {shard['num_samples']}"


def _labels_problems(place: str, table: pa.Table, num_classes: int) -> Iterator[Problem]:
    labels = table["label"].to_numpy()
    for row in np.flatnonzero((labels < 0) | (labels >= num_classes)):
        what = f"label {labels[row]} is not among the {num_classes} classes"
        yield Problem(place, int(table["id"][int(row)].as_py()), what)


def _label_set_problems(place: str, path: Path, num_samples: int, num_classes: int) -> Iterator[Problem]:
    table = _read(path, LABEL_SCHEMA)
    if isinstance(table, str):
        yield Problem(place, None, table)
        return
    if table.num_rows != num_samples:
        yield Problem(place, None, f"has {table.num_rows} labels for {num_samples} samples")
    elif not np.array_equal(table["id"].to_numpy(), np.arange(num_samples)):
        yield Problem(place, None, "ids are not 0, 1, 2, ... in order")
    yield from _labels_problems(place, table, num_classes)


def _shard_problems(job: ShardJob) -> tuple[int, list[Problem]]:
    """Read one shard from end to end; the number of its samples, and its problems."""
    check = _ShardCheck(job)
    problems = []
    if job.is_ours and len(check.rows) < job.rows.num_rows:
        problems.append(Problem(job.place, None, "the index has an offset twice"))
    try:
        with TarReader(job.path) as tar:
            problems += check.problems(tar)
            if tar.num_bytes != job.num_bytes:
                what = f"has {tar.num_bytes:,} bytes, dataset.json states {job.num_bytes:,}"
                problems.append(Problem(job.place, None, what))
            elif tar.sha256 != job.sha256:
                problems.append(Problem(job.place, None, "SHA-256 differs from dataset.json: some byte has changed"))
    except (OSError, UserError) as error:
        problems.append(Problem(job.place, None, f"cannot be opened: {getattr(error, 'strerror', None) or error}"))
        return job.rows.num_rows, problems
    left = (row for group in check.rows.values() for row in group)
    problems += [Problem(job.place, row["id"], "no member begins at its offset") for row in left]
    return job.rows.num_rows, problems


class _ShardCheck:
    """The members of a shard against its rows of the index, of which `rows` (by offset) keeps those without one."""

    def __init__(self, job: ShardJob) -> None:
        self._job = job
        self.rows: dict[int, list[dict[str, Any]]] = defaultdict(list)  # links make several of one offset
        for row in job.rows.to_pylist():
            self.rows[row["offset"]].append(row)
        self._unlabelled: dict[str, dict[str, Any]] = {}  # rows by their keys in the tar, until the .cls comes by
        self._misnamed: list[tuple[dict[str, Any], str]] = []
        self._links: set[str] = set()
        self._by_name = names_of(job.classes or ())

    def problems(self, tar: TarReader) -> list[Problem]:
        """Look at all members."""
        found: list[tuple[dict[str, Any] | None, str]] = []
        try:
            for member in tar:
                names = {split_name(member.name), split_name(member.name, by_last_dot=True)}
                if member.stream is None:
                    self._links.update(key for key, _ in names)
                    continue
                found += self._image(member, names)
                found += self._label(member, names)
        except DamagedTarError as error:
            found.append((None, str(error)))
        if self._job.is_ours:
            found += [(row, "has no label (.cls) in the tar") for row in self._unlabelled.values()]
        for row, key in self._misnamed:
            if not {row["key"], row["key"].partition("/")[2]} & self._links:
                found.append((row, f"the index has key {row['key']}, the tar {key}"))
        return [Problem(self._job.place, None if row is None else row["id"], what) for row, what in found]

    def _image(self, member: Member, names: set[tuple[str, str]]) -> Iterator[tuple[dict[str, Any], str]]:
        if member.offset not in self.rows:
            return
        data = member.read()
        for row in self.rows.pop(member.offset):
            named = [key for key, _ in names if row["key"] == key or row["key"].endswith("/" + key)]
            self._unlabelled |= dict.fromkeys(named, row)
            if not named:
                self._misnamed.append((row, member.key))
            yield from ((row, what) for what in _image_problems(member, data, row, self._job.is_ours))

    def _label(self, member: Member, names: set[tuple[str, str]]) -> Iterator[tuple[dict[str, Any], str]]:
        for key, extension in names:
            if extension == "cls" and key in self._unlabelled:
                row, text = self._unlabelled.pop(key), member.read()
                if not _is_label(text, row["label"], self._job, self._by_name):
                    yield row, f"the index has label {row['label']}, the tar {text[:20]!r}"


def _is_label(text: bytes, label: int, job: ShardJob, by_name: Callable[[str], int | None]) -> bool:
    if job.is_ours:
        return text.strip() == b"%d" % label
    return job.classes is None or could_be(text.decode("utf-8-sig", "replace").strip(), label, by_name)


def _image_problems(member: Member, data: bytes, row: dict[str, Any], is_ours: bool) -> Iterator[str]:
    record = Record(**{name: row[name] for name in Record._fields})
    if is_ours and member.extension not in IMAGE_EXTENSIONS:
        yield f"its offset is that of {member.name}, which is no image"
        return
    if member.size != record.size:
        yield f"the index has size {record.size}, the tar {member.size}"
    if zlib.crc32(data) != record.crc32:
        yield "the image's bytes have changed (CRC-32)"
    try:
        height, width = decoded_size(data, NO_LIMITS)
    except BadImageError as error:
        yield f"the image is bad: {error}"
        return
    if (height, width) != (record.height, record.width):
        yield f"the index has {record.height} x {record.width} pixels, the image {height} x {width}"
