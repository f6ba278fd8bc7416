"""The end of a build: rejected.jsonl, index.parquet and dataset.json, from what was noted of each shard."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nldist.data.make.lock import locked
from nldist.data.make.meaning import Meaning, shown
from nldist.data.manifest import FORMAT_VERSION, known_classes, read_dataset, write_json, writing
from nldist.data.remote import without_secrets
from nldist.errors import UserError

ROW_GROUP = 65_536
RECORD = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int32()),
        ("crc32", pa.uint32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
INDEX_COLUMNS = ("id", "key", "shard", "offset", "size", "label", "crc32", "height", "width")


class Record(NamedTuple):
    """One image of a shard: its key, where its bytes are in the tar, label, checksum and size in pixels."""

    key: str
    offset: int
    size: int
    label: int
    crc32: int
    height: int
    width: int


class Rejected(NamedTuple):
    """One refused image."""

    path: str
    reason: str


class ShardFacts(NamedTuple):
    """What dataset.json says of a shard, and what was refused on the way to it."""

    path: str
    num_samples: int
    num_bytes: int
    sha256: str
    rejected: list[Rejected]


@dataclass(frozen=True)
class Summary:
    """What a finished split holds; `was_complete` if there was nothing to do. `notes` are for the user.

    `num_new` images were looked at since the start, others before.
    """

    split: str
    num_samples: int
    num_shards: int
    rejected: list[Rejected]
    num_bytes: int
    num_new: int = 0
    was_complete: bool = False
    notes: list[str] = field(default_factory=list)

    def report(self, place: Path, seconds: float) -> str:
        """What there is to say of it at the end, `seconds` after the start."""
        if self.was_complete:
            return f"{place}: already complete, {self.num_samples:,} images in {self.num_shards:,} shards"
        rate = f", {self.num_new / seconds:,.0f} images/s" if self.num_new else ""
        lines = [
            f"{place}: {self.num_samples:,} images in {self.num_shards:,} shards, {len(self.rejected):,} left out, "
            f"{self.num_bytes / 1e9:.3f} GB, {seconds:.1f} s{rate}"
        ]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  left out: {entry.path}: {entry.reason}" for entry in self.rejected[:5]]
        return "\n".join(lines)


Shard = tuple[ShardFacts, pa.Table, list[str] | None]
"""A shard's facts, its records, and the texts that their labels are positions of (None: they are classes)."""


def finish(
    root: Path,
    split: str,
    shards: Iterable[Shard],
    classes: list[str] | Callable[[list[str]], Meaning],
    name: str | None,
    on_bad: str,
) -> Summary:
    """Write the files that make a split of its shards.

    `classes` are the names, or what gives the labels' texts their meaning. `name` None keeps the data set's name, or
    takes its directory's.

    Raises:
        UserError: images were refused and `on_bad` is "refuse" (then neither index nor data set is
            written, but finished shards stay), or no image is left; or the classes differ from another split's.
    """
    listed = list(shards)
    if callable(classes):
        listed, classes = _with_classes(listed, classes)
    facts, tables = [shard[0] for shard in listed], [shard[1] for shard in listed]
    summary = Summary(
        split,
        sum(shard.num_samples for shard in facts),
        len(facts),
        [entry for shard in facts for entry in shard.rejected],
        sum(shard.num_bytes for shard in facts),
    )
    with locked(root / ".dataset.lock"):
        _write_rejected(root, split, summary.rejected)
        if summary.rejected and on_bad == "refuse":
            raise UserError(_refusal(root, summary))
        if summary.num_samples == 0:
            raise UserError(f"no image is left for {root / split}; see {root / 'rejected.jsonl'}")
        index = _index(facts, tables)
        with writing(root / split / "index.parquet") as aside:
            pq.write_table(index, aside, row_group_size=ROW_GROUP)
        _write_dataset(root, split, facts, classes, name)
    summary.notes.extend(_empty(index, classes))
    return summary


def check_classes(root: Path, split: str, classes: list[str] | None) -> None:
    """Raise UserError unless the data set's other splits have the same classes; None can be any."""
    known = known_classes(root, split)
    if known is None or classes is None or classes == known:
        return
    missing, extra = sorted(set(known) - set(classes)), sorted(set(classes) - set(known))
    raise UserError(
        f"the classes differ from those of the other splits in {root / 'dataset.json'}: "
        f"missing here {missing[:5]}, only here {extra[:5]}; "
        "all splits must have the same classes in the same order, which --classes FILE gives; some may have no image"
    )


def rejected_of(root: Path, split: str) -> list[Rejected]:
    """What was refused of a split."""
    return [Rejected(line["path"], line["reason"]) for line in _lines(root) if line["split"] == split]


def _with_classes(shards: Sequence[Shard], meaning: Callable[[list[str]], Meaning]) -> tuple[list[Shard], list[str]]:
    """Give the records the classes of their labels; those whose label has none are refused."""
    texts = dict.fromkeys(text for _, _, labels in shards for text in labels or ())
    found = meaning(list(texts))
    result: list[Shard] = []
    for facts, table, labels in shards:
        class_of = np.array([found.class_of.get(text, -1) for text in labels or ()], np.int32)
        codes = table["label"].to_numpy()
        column = pa.array(class_of[codes] if len(codes) else codes, pa.int32())
        bad = table["key"].filter(pc.less(column, 0)).to_pylist()
        reasons = [found.faults[(labels or [])[code]] for code in codes if class_of[code] < 0]
        place = without_secrets(facts.path)
        rejected = [Rejected(f"{place}:{key}", why) for key, why in zip(bad, reasons, strict=True)]
        table = table.set_column(table.schema.get_field_index("label"), "label", column)
        table = table.filter(pc.greater_equal(column, 0))
        facts = facts._replace(num_samples=table.num_rows, rejected=[*facts.rejected, *rejected])
        result.append((facts, table, None))
    return result, found.classes


def _index(facts: Sequence[ShardFacts], tables: Sequence[pa.Table]) -> pa.Table:
    counts = [shard.num_samples for shard in facts]
    table = pa.concat_tables(tables)
    numbers = [pa.array([number] * count, pa.int32()) for number, count in enumerate(counts)]
    table = table.append_column("shard", pa.chunked_array(numbers, pa.int32()))
    table = table.append_column("id", pa.array(np.arange(table.num_rows)))
    if pc.count_distinct(table["key"]).as_py() < table.num_rows:
        stems = [pa.array([Path(without_secrets(shard.path)).stem] * shard.num_samples, pa.string()) for shard in facts]
        keys = pc.binary_join_element_wise(pa.chunked_array(stems, pa.string()), table["key"], "/")
        table = table.set_column(table.schema.get_field_index("key"), "key", keys)
    return table.select(INDEX_COLUMNS)


def _empty(index: pa.Table, classes: Sequence[str]) -> list[str]:
    """A note on classes without an image: a class 0 for nothing is what labels from 1 look like."""
    counts = np.bincount(index["label"].to_numpy(), minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    return [f"{len(empty):,} of {len(classes):,} classes have no image: {shown(empty)}"] if empty else []


def _lines(root: Path) -> list[dict[str, str]]:
    path = root / "rejected.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_rejected(root: Path, split: str, rejected: Sequence[Rejected]) -> None:
    path = root / "rejected.jsonl"
    others = [line for line in _lines(root) if line["split"] != split]
    lines = [*others, *({"split": split, **entry._asdict()} for entry in rejected)]
    if not lines:
        path.unlink(missing_ok=True)
        return
    with writing(path) as aside:
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _refusal(root: Path, summary: Summary) -> str:
    first = "; ".join(f"{entry.path}: {entry.reason}" for entry in summary.rejected[:3])
    total = summary.num_samples + len(summary.rejected)
    return (
        f"{len(summary.rejected):,} of {total:,} images of {root / summary.split} are bad ({first}); "
        f"all are listed in {root / 'rejected.jsonl'}. "
        "Repair them, or run again with --on-bad skip to leave them out"
    )


def _write_dataset(root: Path, split: str, shards: Sequence[ShardFacts], classes: list[str], name: str | None) -> None:
    check_classes(root, split, classes)
    path = root / "dataset.json"
    old: dict[str, Any] = {"name": root.resolve().name, "splits": {}}
    if path.exists():
        old = read_dataset(root)
    entry = {
        "num_samples": sum(facts.num_samples for facts in shards),
        "shards": [
            {field: getattr(facts, field) for field in ("path", "num_samples", "num_bytes", "sha256")}
            for facts in shards
        ],
    }
    splits = {**old["splits"], split: entry}
    write_json(
        path,
        {
            "format_version": FORMAT_VERSION,
            "name": name or old["name"],
            "classes": classes,
            "splits": dict(sorted(splits.items())),
        },
    )
