"""A split of a data set while it is being built: what is done survives a kill, the end is a single step.

Each finished shard leaves a sidecar in SPLIT/.build with its records, so that a second start does only what
is missing. Nobody sees the split before dataset.json names it, which is the last thing written.
"""

import glob
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nldist.data.make.finish import RECORD, Record, Rejected, ShardFacts, Summary, check_classes, rejected_of
from nldist.data.make.listed import Listed
from nldist.data.make.lock import locked
from nldist.data.manifest import read_dataset, write_json, writing
from nldist.data.remote import is_url
from nldist.errors import UserError


class Build:
    """The building of ROOT/SPLIT. Picklable and small: workers use it to find their places."""

    def __init__(self, root: Path, split: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
            raise UserError(f"'{split}' cannot name a split: use letters, digits, - and _")
        self.root, self.split = root, split
        self.folder = root / split
        self._work = self.folder / ".build"

    @contextmanager
    def claimed(self, *, shared: bool = False) -> Iterator[None]:
        """Nobody else builds this split meanwhile, but those that have `shared` it: each of these has its own shards.

        Raises:
            UserError: another command builds it already.
        """
        if self._is_complete():
            yield
            return
        in_use = f"{self.folder} is being written by another command: wait until it has ended, then run again"
        with locked(self.root / f".{self.split}.lock", in_use, shared=shared):
            yield

    def check(self, plan: dict[str, Any], classes: list[str] | None, reads: Sequence[str] = ()) -> bool:
        """Whether there is anything to do: False if the split is complete and was built to this `plan`.

        An unfinished build to another plan is refused, unless only entries differ that `begin` goes on with.

        Raises:
            UserError: what is there was built to another plan, or the classes differ from another split's.
        """
        check_classes(self.root, self.split, classes)
        there, is_complete, differing = self._read_plan(), self._is_complete(), self._differing(plan)
        if there is not None and differing and (is_complete or not reads or "source" in differing):
            raise UserError(
                f"{self.folder} was begun with other input or options ({', '.join(differing)} differ): "
                f"run with those again, or delete {self.folder} and start over"
            )
        if there is None and self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} holds files that were not written by this tool: choose another place")
        return there is None or not is_complete

    def begin(self, plan: dict[str, Any], classes: list[str] | None, reads: Sequence[str] = ()) -> bool:
        """Start or go on, and return True; or False if there is nothing to do.

        With `reads` an unfinished build to another plan goes on: what is done is done again if an entry of the plan in
        `reads` differs.

        Raises:
            UserError: as `check`.
        """
        is_open, differing = self.check(plan, classes, reads), self._differing(plan)
        if not is_open or not set(reads).isdisjoint(differing):
            shutil.rmtree(self._work, ignore_errors=True)
        if not is_open:
            return False
        self._work.mkdir(parents=True, exist_ok=True)
        for sidecar in self._work.glob("*.parquet") if reads else ():
            if b"labels" not in pq.read_schema(sidecar).metadata:  # of an older nldist
                sidecar.unlink()
        if differing:
            write_json(self.folder / "plan.json", plan)
        return True

    def has_plan(self, plan: dict[str, Any]) -> bool:
        """Whether this build was begun with this plan."""
        return self._read_plan() == plan

    def shard_path(self, number: int) -> Path:
        """Where shard `number` of this split belongs."""
        return self.folder / f"{self.split}-{number:06d}.tar"

    def save_shard(
        self, number: int, records: Sequence[Record], facts: ShardFacts, labels: Sequence[str] | None = None
    ) -> None:
        """Mark a shard as done, its file being in place. With `labels` a record's label is a position among them."""
        columns = zip(*records, strict=True) if records else ([] for _ in RECORD)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, RECORD, strict=True)]
        table = pa.table(arrays, RECORD.with_metadata({"facts": json.dumps(facts), "labels": json.dumps(labels)}))
        with writing(self._sidecar(number)) as aside:
            pq.write_table(table, aside)

    def is_settled(self, number: int, on_bad: str, path: str | None = None) -> bool:
        """Whether a shard (at `path`) need not be done again; under "refuse", bad images may be repaired by now."""
        facts = self.load_facts(number)
        if facts is None or path not in (None, facts.path):
            return False
        return not (facts.rejected and on_bad == "refuse")

    def forget_shard(self, number: int) -> None:
        """Have a shard done again."""
        self._sidecar(number).unlink(missing_ok=True)

    def load_facts(self, number: int) -> ShardFacts | None:
        """What `save_shard` was told, or None if the shard is not done or its file has another size since."""
        if not self._sidecar(number).exists():
            return None
        metadata = pq.read_schema(self._sidecar(number)).metadata
        path, num_samples, num_bytes, sha256, rejected = json.loads(metadata[b"facts"])
        local = self.root / path
        if not is_url(path) and (not local.exists() or local.stat().st_size != num_bytes):
            return None
        return ShardFacts(path, num_samples, num_bytes, sha256, [Rejected(*entry) for entry in rejected])

    def shards(self, num_shards: int) -> Iterator[tuple[ShardFacts, pa.Table, list[str] | None]]:
        """What `save_shard` was told of each shard. Raises UserError if one is not done."""
        for number in range(num_shards):
            facts = self.load_facts(number)
            if facts is None:
                raise UserError(f"shard {number} of {self.folder} vanished or changed meanwhile: run again")
            table = pq.read_table(self._sidecar(number))
            labels = json.loads(table.schema.metadata.get(b"labels", b"null"))
            yield facts, table.replace_schema_metadata(), labels

    @property
    def listed(self) -> Listed:
        """What the shards are to be made of, until the split is complete."""
        return Listed(self._work / "listing.arrow")

    def remove_stale(self, path: Path) -> None:
        """Remove what killed processes have left of a file that nobody else writes now."""
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            stale.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what a finished split does not need."""
        self.listed.file.unlink(missing_ok=True)  # first: a split without it is finished
        shutil.rmtree(self._work, ignore_errors=True)
        for stale in self.folder.glob(".*.part"):
            stale.unlink(missing_ok=True)

    def complete_summary(self) -> Summary:
        """The summary of a split that was complete before. Raises UserError if it is not."""
        if not self._is_complete():
            raise UserError(f"{self.folder} was removed or is not complete: run again")
        entry = read_dataset(self.root)["splits"][self.split]
        rejected = rejected_of(self.root, self.split)
        num_bytes = sum(shard["num_bytes"] for shard in entry["shards"])
        return Summary(self.split, entry["num_samples"], len(entry["shards"]), rejected, num_bytes, was_complete=True)

    def _differing(self, plan: dict[str, Any]) -> list[str]:
        """The entries in which the plan of this build is another one."""
        there = self._read_plan() or {}
        return sorted(name for name in {*there, *plan} if there.get(name) != plan.get(name))

    def _sidecar(self, number: int) -> Path:
        return self._work / f"{number:06d}.parquet"

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
