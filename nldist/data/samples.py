"""RUN/tables/samples.parquet: what a run says of every label."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nldist.data.index import Index
from nldist.errors import UserError
from nldist.files import replacing

_CLASS_SHARE = 0.5  # of a class's mean margin: it is small where a class is hard, and where its labels are wrong
_PRIOR = 20  # labels: a class with fewer has hardly a mean of its own
_ROWS_PER_WRITE = 65_536
SAMPLES_FILE = Path("tables", "samples.parquet")  # in a run directory


@dataclass(frozen=True)
class Samples:
    """What a run says of its N training samples.

    Attributes:
        given: int (N,), the labels that it was trained on.
        clean_probability: float32 (N,), that they are right; NaN where it does not know.
        suggested: int (N,), the class that it holds for right; -1 where it does not know.
        margin: float32 (N,), the given class's logit by the trained networks less the greatest other one's, over some
            views; NaN where not known: before the run's end, and where the image could not be read then.
        label_set: that `given` is; None: the labels in the shards.
        num_epochs: after how many it says this.
        of_epochs: how many the run has in all.
    """

    given: np.ndarray
    clean_probability: np.ndarray
    suggested: np.ndarray
    margin: np.ndarray
    label_set: str | None
    num_epochs: int
    of_epochs: int

    @property
    def when(self) -> str:
        """After which part of the run it says this, for people."""
        return f"after epoch {self.num_epochs} of {self.of_epochs}"

    @property
    def ended(self) -> bool:
        """Whether it is of the run's end, when margins are known of all images that can be read."""
        return not np.isnan(self.margin).all()

    def order(self) -> np.ndarray:
        """Ids of all samples that it judges, the most doubtful label first, int64.

        By the margin, less half the mean margin of the given class (docs/audit.md); before the run's end, when margins
        are not known, and where they are the same, by the probability to be right.
        """
        judged = ~np.isnan(self.clean_probability)
        if not self.ended:
            ids: np.ndarray = np.flatnonzero(judged)
            return ids[np.argsort(self.clean_probability[ids], kind="stable")]
        ids = np.flatnonzero(judged & ~np.isnan(self.margin))
        relative = self.margin[ids] - _CLASS_SHARE * self._mean_margins()[self.given[ids]]
        return ids[np.lexsort((self.clean_probability[ids], relative))]

    def _mean_margins(self) -> np.ndarray:
        """Of each given class, (C,), as if it had `_PRIOR` more labels of the mean margin of all."""
        known = ~np.isnan(self.margin)
        given, margin = self.given[known], self.margin[known]
        num_classes = int(self.given.max()) + 1
        sums, counts = (np.bincount(given, weights, num_classes) for weights in (margin, None))
        means: np.ndarray = (sums + _PRIOR * margin.mean()) / (counts + _PRIOR)
        return means

    def write(self, run_dir: Path, index: Index) -> None:
        """Write the file of a run on the samples of `index`: also their ids and keys; null where it does not know."""
        about: dict[str, Any] = {"classes": index.classes, "label_set": self.label_set}
        about |= {"num_epochs": self.num_epochs, "of_epochs": self.of_epochs}
        tables = self._tables(index)
        first = next(tables)
        schema = first.schema.with_metadata({name: json.dumps(value) for name, value in about.items()})
        with replacing(run_dir / SAMPLES_FILE) as aside, pq.ParquetWriter(aside, schema) as file:
            for table in itertools.chain([first], tables):
                file.write_table(table)

    def _tables(self, index: Index) -> Iterator[pa.Table]:
        """The rows of the file, some at a time: texts of all would be most of the memory."""
        start = 0
        for keys in index.key_batches(_ROWS_PER_WRITE):
            part = slice(start, start := start + len(keys))
            clean, suggested, margin = self.clean_probability[part], self.suggested[part], self.margin[part]
            yield pa.table(
                {
                    "id": np.arange(part.start, part.stop),
                    "key": keys,
                    "label": self.given[part],
                    "clean_probability": pa.array(clean, mask=np.isnan(clean)),
                    "suggested": pa.array(suggested, mask=suggested < 0),
                    "margin": pa.array(margin, mask=np.isnan(margin)),
                }
            )

    @classmethod
    def read(cls, run_dir: Path, index: Index) -> "Samples":
        """Of a run on the samples of `index`.

        Raises:
            UserError: the run has left none, or its samples or classes are others.
        """
        file = run_dir / SAMPLES_FILE
        try:
            table = pq.read_table(file)
        except FileNotFoundError:
            raise UserError(f"{file} is missing: the run says nothing about labels yet") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} is damaged: {error}") from None
        about = {key.decode(): json.loads(value) for key, value in (table.schema.metadata or {}).items()}
        if "of_epochs" not in about:
            raise UserError(f"{file} is of an nldist before 0.2, which did not say what its labels are; train again")
        if about["classes"] != index.classes:
            raise UserError(f"{run_dir} was trained on other classes (or another order of them) than {index.root} has")
        if not table["key"].equals(index.key_column()):  # in the order of ids, as it is written
            raise UserError(f"{run_dir} was trained on other samples than {index.root / index.split} has")
        return cls(
            table["label"].to_numpy().astype(np.int32),
            table["clean_probability"].fill_null(np.nan).to_numpy(),
            table["suggested"].fill_null(-1).to_numpy().astype(np.int32),
            table["margin"].fill_null(np.nan).to_numpy(),
            about["label_set"],
            about["num_epochs"],
            about["of_epochs"],
        )
