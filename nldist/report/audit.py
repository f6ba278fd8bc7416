"""What a run says of all labels, as tables: which are probably wrong, how many of each class, in which pairs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from nldist.data.index import Index
from nldist.data.remote import without_secrets
from nldist.data.samples import Samples
from nldist.files import replacing

WRONG = 0.5  # a label less probable than this counts as wrong
SURE, POSSIBLE = 0.1, 0.9  # the least and the most that may be wrong: those less probable than this
_ROWS_PER_WRITE = 131_072


@dataclass(frozen=True)
class Count:
    """How many of some labels are probably wrong.

    Attributes:
        labels: how many are judged.
        expected: sum of the probabilities to be wrong.
        least: how many are hardly right (p < 0.1).
        most: how many are not surely right (p < 0.9).
    """

    labels: int
    expected: float
    least: int
    most: int


@dataclass(frozen=True)
class Pair:
    """Labels of one class that another class is suggested for, and that are probably wrong."""

    given: int
    suggested: int
    count: int


class Audit:
    """The labels of a run's samples, by how doubtful they are.

    Args:
        samples: what the run says.
        index: the split that it trained on.

    Attributes:
        order: int64 (judged,), the ids of all samples that the run has seen, the most doubtful label first.
        wrong: bool (N,), whether a label is probably wrong: less than half as probable, and another class suggested.
        rank: int64 (N,), each one's place in it, from 1; the number of judged samples + 1 where it is not there.
        unseen: int64, ids of the others: of a run that has ended, images that could not be read.
    """

    def __init__(self, samples: Samples, index: Index) -> None:
        self.samples, self.index = samples, index
        self.order = samples.order()
        self.rank = np.full(len(samples.given), len(self.order) + 1)
        self.rank[self.order] = np.arange(1, len(self.order) + 1)
        self.unseen = np.flatnonzero(self.rank > len(self.order))
        doubtful = samples.clean_probability < WRONG
        self.wrong = doubtful & (samples.suggested != samples.given) & (samples.suggested >= 0)

    def total(self) -> Count:
        """Over all classes."""
        return self._counts(np.zeros(len(self.samples.given), np.int64), 1)[0]

    def by_class(self) -> list[Count]:
        """Of each given class, in their order."""
        return self._counts(self.samples.given, self.index.num_classes)

    def _counts(self, groups: np.ndarray, num_groups: int) -> list[Count]:
        probability = self.samples.clean_probability[self.order]
        members = groups[self.order]
        labels = np.bincount(members, minlength=num_groups)
        expected = np.bincount(members, 1.0 - probability, minlength=num_groups)
        least, most = (
            np.bincount(members[probability < edge], minlength=num_groups).tolist() for edge in (SURE, POSSIBLE)
        )
        return [Count(*row) for row in zip(labels.tolist(), expected.tolist(), least, most, strict=True)]

    def pairs(self) -> list[Pair]:
        """Pairs of given and suggested class with labels that are probably wrong, those with most first."""
        num_classes, wrong = self.index.num_classes, np.flatnonzero(self.wrong)
        codes = self.samples.given[wrong].astype(np.int64) * num_classes + self.samples.suggested[wrong]
        found, counts = np.unique(codes, return_counts=True)
        by_count = np.lexsort((found, -counts))
        return [
            Pair(code // num_classes, code % num_classes, count)
            for code, count in zip(found[by_count].tolist(), counts[by_count].tolist(), strict=True)
        ]

    def chosen(self, pairs: list[Pair], num_images: int, num_each: int) -> np.ndarray:
        """The samples to be looked at: ids (at most `num_images`), the most doubtful first.

        Half of them, as far as that goes, are of each of `pairs` the `num_each` most doubtful that are probably wrong;
        the rest are the most doubtful of all.
        """
        wrong = np.flatnonzero(self.wrong[self.order])  # places in the order
        given, suggested = self.samples.given[self.order[wrong]], self.samples.suggested[self.order[wrong]]
        codes = given.astype(np.int64) * self.index.num_classes + suggested
        places: list[int] = []
        for pair in pairs:
            code = pair.given * self.index.num_classes + pair.suggested
            own = wrong[codes == code][:num_each].tolist()
            if len(places) + len(own) > num_images // 2:
                break
            places += own
        rest = np.setdiff1d(np.arange(min(len(self.order), 2 * num_images)), places)[: num_images - len(places)]
        ids: np.ndarray = self.order[np.sort(np.concatenate([np.array(places, np.int64), rest]))]
        return ids

    def table(self, ids: np.ndarray, keys: pa.ChunkedArray) -> pa.Table:
        """Of some samples: key, path (of its shard), given, suggested, p_clean, margin, rank (1 = most doubtful).

        `keys` are those of all samples. What is not known is null.
        """
        samples, index = self.samples, self.index
        classes = pa.array(index.classes, pa.string())
        shards = pa.array([_relative(shard, index.root) for shard in index.shards], pa.string())
        given, suggested = samples.given[ids], samples.suggested[ids]
        probability, margin = samples.clean_probability[ids], samples.margin[ids]
        return pa.table(
            {
                "key": keys.take(pa.array(ids)),
                "path": shards.take(pa.array(index.shard[ids])),
                "given": classes.take(pa.array(given)),
                "suggested": classes.take(pa.array(suggested, mask=suggested < 0)),
                "p_clean": pa.array(probability, mask=np.isnan(probability)),
                "margin": pa.array(margin, mask=np.isnan(margin)),
                "rank": pa.array(self.rank[ids], mask=self.rank[ids] > len(self.order)),
            }
        )

    def write_tables(self, folder: Path) -> None:
        """Write labels.parquet and labels.csv, the most doubtful first, some rows at a time."""
        ids, keys = np.concatenate([self.order, self.unseen]), self.index.key_column()
        schema = self.table(ids[:0], keys).schema
        with (
            replacing(folder / "labels.parquet") as parquet,
            replacing(folder / "labels.csv") as text,
            pq.ParquetWriter(parquet, schema) as columns,
            pa.csv.CSVWriter(text, schema) as lines,
        ):
            for start in range(0, len(ids), _ROWS_PER_WRITE):
                rows = self.table(ids[start : start + _ROWS_PER_WRITE], keys)
                columns.write_table(rows)
                lines.write_table(rows)


def _relative(shard: str, root: Path) -> str:
    """A shard's place in its data set; of one that lies elsewhere its own."""
    return str(Path(shard).relative_to(root)) if Path(shard).is_relative_to(root) else without_secrets(shard)
