"""A split of a data set while it is being built: what is done survives a kill, the end is a single step.

Each finished shard leaves a sidecar in SPLIT/.build with its records, so that a second start does only what
is missing. Nobody sees the split before dataset.json names it, which is the last thing written.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nldist.data.manifest import FORMAT_VERSION, known_classes, read_dataset, write_json, writing
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
    """What a finished split holds; `was_complete` if there was nothing to do."""

    split: str
    num_samples: int
    num_shards: int
    rejected: list[Rejected]
    was_complete: bool = False


class Build:
    """The building of ROOT/SPLIT. Picklable and small: workers use it to find their places."""

    def __init__(self, root: Path, split: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
            raise UserError(f"'{split}' cannot name a split: use letters, digits, - and _")
        self.root, self.split = root, split
        self.folder = root / split
        self._work = self.folder / ".build"

    def begin(self, plan: dict[str, Any], classes: list[str] | None) -> bool:
        """Start or go on, and return True; or False if the split is complete and was built to this `plan`.

        Raises:
            UserError: what is there was built to another plan, or the classes differ from another split's.
        """
        self._check_classes(classes)
        there = self._read_plan()
        if there is not None and there != plan:
            names = sorted(name for name in {*there, *plan} if there.get(name) != plan.get(name))
            raise UserError(
                f"{self.folder} was begun with other input or options ({', '.join(names)} differ): "
                f"run with those again, or delete {self.folder} and start over"
            )
        if there is None and self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} holds files that were not written by this tool: choose another place")
        if there is not None and self._is_complete():
            shutil.rmtree(self._work, ignore_errors=True)
            return False
        self._work.mkdir(parents=True, exist_ok=True)
        for stale in (*self.folder.glob("*.part"), *self._work.glob("*.part")):
            stale.unlink(missing_ok=True)
        if there is None:
            write_json(self.folder / "plan.json", plan)
        return True

    def shard_path(self, number: int) -> Path:
        """Where shard `number` of this split belongs."""
        return self.folder / f"{self.split}-{number:06d}.tar"

    def save_shard(self, number: int, records: Sequence[Record], facts: ShardFacts) -> None:
        """Mark a shard as done, its file being in place."""
        columns = zip(*records, strict=True) if records else ([] for _ in RECORD)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, RECORD, strict=True)]
        table = pa.table(arrays, RECORD.with_metadata({"facts": json.dumps(facts)}))
        with writing(self._sidecar(number)) as aside:
            pq.write_table(table, aside)

    def is_settled(self, number: int, on_bad: str) -> bool:
        """Whether a shard need not be done again; under "refuse", bad images may have been repaired since."""
        facts = self.load_facts(number)
        return facts is not None and not (facts.rejected and on_bad == "refuse")

    def load_facts(self, number: int) -> ShardFacts | None:
        """What `save_shard` was told, or None if the shard is not done or its file has another size since."""
        if not self._sidecar(number).exists():
            return None
        metadata = pq.read_schema(self._sidecar(number)).metadata
        path, num_samples, num_bytes, sha256, rejected = json.loads(metadata[b"facts"])
        local = self.root / path
        if "://" not in path and (not local.exists() or local.stat().st_size != num_bytes):
            return None
        return ShardFacts(path, num_samples, num_bytes, sha256, [Rejected(*entry) for entry in rejected])

    def finish(self, num_shards: int, classes: list[str] | None, name: str | None, on_bad: str) -> Summary:
        """Write rejected.jsonl, index.parquet and dataset.json from the sidecars.

        `classes` None names the labels "0" up to the largest. `name` None keeps the data set's name, or takes
        its directory's.

        Raises:
            UserError: images were refused and `on_bad` is "refuse" (then neither index nor data set is
                written, but finished shards stay), or no image is left.
        """
        shards = [self._done(number) for number in range(num_shards)]
        summary = Summary(
            self.split,
            sum(facts.num_samples for facts in shards),
            num_shards,
            [entry for facts in shards for entry in facts.rejected],
        )
        self._write_rejected(summary.rejected)
        if summary.rejected and on_bad == "refuse":
            raise UserError(self._refusal(summary))
        if summary.num_samples == 0:
            raise UserError(f"no image is left for {self.folder}; see {self.root / 'rejected.jsonl'}")
        index = self._index(shards)
        with writing(self.folder / "index.parquet") as aside:
            pq.write_table(index, aside, row_group_size=ROW_GROUP)
        largest = pc.max(index["label"]).as_py()
        self._write_dataset(shards, classes or [str(label) for label in range(largest + 1)], name)
        shutil.rmtree(self._work, ignore_errors=True)
        return summary

    def complete_summary(self) -> Summary:
        """The summary of a split that was complete before."""
        entry = read_dataset(self.root)["splits"][self.split]
        rejected = [Rejected(line["path"], line["reason"]) for line in self._rejected_lines(own=True)]
        return Summary(self.split, entry["num_samples"], len(entry["shards"]), rejected, was_complete=True)

    def _sidecar(self, number: int) -> Path:
        return self._work / f"{number:06d}.parquet"

    def _done(self, number: int) -> ShardFacts:
        facts = self.load_facts(number)
        if facts is None:
            raise UserError(f"shard {number} of {self.folder} vanished or changed meanwhile: run again")
        return facts

    def _read_plan(self) -> dict[str, Any] | None:
        try:
            plan: dict[str, Any] = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(f"{self.folder / 'plan.json'} is damaged: delete {self.folder} and start over") from None
        return plan

    def _is_complete(self) -> bool:
        dataset = read_dataset(self.root) if (self.root / "dataset.json").exists() else {"splits": {}}
        return self.split in dataset["splits"] and (self.folder / "index.parquet").exists()

    def _check_classes(self, classes: list[str] | None) -> None:
        known = known_classes(self.root, self.split)
        if known is None or classes is None or classes == known:
            return
        missing, extra = sorted(set(known) - set(classes)), sorted(set(classes) - set(known))
        raise UserError(
            f"the classes differ from those of the other splits in {self.root / 'dataset.json'}: "
            f"missing here {missing[:5]}, only here {extra[:5]}; "
            "all splits must have the same classes in the same order"
        )

    def _index(self, shards: list[ShardFacts]) -> pa.Table:
        tables = [pq.read_table(self._sidecar(number)).replace_schema_metadata() for number in range(len(shards))]
        counts = [facts.num_samples for facts in shards]
        table = pa.concat_tables(tables)
        numbers = [pa.array([number] * count, pa.int32()) for number, count in enumerate(counts)]
        table = table.append_column("shard", pa.chunked_array(numbers, pa.int32()))
        table = table.append_column("id", pa.array(np.arange(table.num_rows)))
        if pc.count_distinct(table["key"]).as_py() < table.num_rows:
            stems = [pa.array([Path(f.path).stem] * f.num_samples, pa.string()) for f in shards]
            keys = pc.binary_join_element_wise(pa.chunked_array(stems, pa.string()), table["key"], "/")
            table = table.set_column(table.schema.get_field_index("key"), "key", keys)
        return table.select(INDEX_COLUMNS)

    def _write_rejected(self, rejected: list[Rejected]) -> None:
        path = self.root / "rejected.jsonl"
        lines = [*self._rejected_lines(own=False), *({"split": self.split, **r._asdict()} for r in rejected)]
        if not lines:
            path.unlink(missing_ok=True)
            return
        with writing(path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def _rejected_lines(self, own: bool) -> list[dict[str, str]]:
        path = self.root / "rejected.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if (line["split"] == self.split) == own]

    def _refusal(self, summary: Summary) -> str:
        first = "; ".join(f"{entry.path}: {entry.reason}" for entry in summary.rejected[:3])
        total = summary.num_samples + len(summary.rejected)
        return (
            f"{len(summary.rejected):,} of {total:,} images of {self.folder} are bad ({first}); "
            f"all are listed in {self.root / 'rejected.jsonl'}. "
            "Repair them, or run again with --on-bad skip to leave them out"
        )

    def _write_dataset(self, shards: list[ShardFacts], classes: list[str], name: str | None) -> None:
        self._check_classes(classes)
        path = self.root / "dataset.json"
        old: dict[str, Any] = {"name": self.root.resolve().name, "splits": {}}
        if path.exists():
            old = read_dataset(self.root)
        entry = {
            "num_samples": sum(facts.num_samples for facts in shards),
            "shards": [
                {field: getattr(facts, field) for field in ("path", "num_samples", "num_bytes", "sha256")}
                for facts in shards
            ],
        }
        splits = {**old["splits"], self.split: entry}
        write_json(
            path,
            {
                "format_version": FORMAT_VERSION,
                "name": name or old["name"],
                "classes": classes,
                "splits": dict(sorted(splits.items())),
            },
        )
