"""A report about the labels of a run, from what it said of them: no network is asked."""

import contextlib
import csv
import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nldist import __version__
from nldist.config import Config
from nldist.data.index import Index
from nldist.data.reader import Reader
from nldist.data.remote import is_url
from nldist.data.samples import Samples
from nldist.errors import UserError
from nldist.estimate.graph import open_graph
from nldist.files import replacing
from nldist.passes.data import Data, NodeCaches
from nldist.pretext.mine import GRAPH_FILE, MINE
from nldist.report.audit import Audit
from nldist.report.duplicates import Duplicates, exact, near
from nldist.report.page import SIDE, write_page
from nldist.run.directory import RunDirectory
from nldist.track.sender import OUTBOX_FILE
from nldist.track.tracker import publish
from nldist.train.stages import stage_directories

_FILES = ("index.html", "labels.csv", "labels.parquet", "duplicates.csv")
_MAX_PAIRS = 5000  # of nearest neighbours that are compared pixel by pixel


def audit(run_dir: Path, out: Path | None, num_images: int, overrides: Sequence[str]) -> Iterator[str]:
    """Write the report of a run, finished or not, into `out` (None: RUN/audit); yields lines about it.

    MLflow gets it, too, where the run is tracked and no job is using it.

    Raises:
        UserError: the run has said nothing about labels yet, its data set is not there, or `out` cannot be written or
            holds files that are not of a report.
    """
    run = RunDirectory(run_dir)
    config = run.config(overrides)
    if not config.data.root.exists():
        raise UserError(f"the run's data set is not in {config.data.root}; if it has moved, add data.root=ITS_PLACE")
    data = config.data
    index = Index.open(data.root, data.train_split, data.cache_dir, data.labels_dir)
    found = Audit(Samples.read(run_dir, index), index)
    total = found.total()
    yield (
        f"{int(found.wrong.sum()):,} of {total.labels:,} labels are probably wrong (expected {total.expected:,.0f}, "
        f"{total.least:,} to {total.most:,}), {found.samples.when}"
    )
    folder = out or run_dir / "audit"
    if out is not None:
        _check_own(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        duplicates, size = _write(folder, run, config, found, num_images)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error})") from None
    unread = "images not read" if found.samples.ended else "images not judged yet, or not readable"
    yield f"{duplicates:,} groups of duplicates with different labels, {len(found.unseen):,} {unread}"
    yield f"{folder / 'index.html'} ({size / 2**20:.1f} MiB), {', '.join(_FILES[1:])}"
    yield from _publish(run, [folder / name for name in _FILES])


def _check_own(folder: Path) -> None:
    """Refuse (UserError) a directory that has files of these names which are not of an earlier report."""
    if there := [name for name in _FILES if (folder / name).exists()]:
        page = folder / "index.html"
        head = page.read_bytes()[:2048] if page.is_file() else b""
        if b'content="nldist audit"' not in head:
            raise UserError(f"{folder / there[0]} exists and is not of an audit: choose another --out, or remove it")


def _write(folder: Path, run: RunDirectory, config: Config, found: Audit, num_images: int) -> tuple[int, int]:
    """Write the files; returns the number of groups of duplicates, and the page's size in bytes."""
    index = found.index
    found.write_tables(folder)
    with contextlib.closing(Reader(index, "skip", SIDE, NodeCaches(config.data).shards)) as reader:
        duplicates = _duplicates(found, reader, _graph(config, index))
        _write_duplicates(folder / "duplicates.csv", found, duplicates)
        facts = _facts(run, config, found)
        size = write_page(folder / "index.html", found, reader, facts, duplicates, _refused(index), num_images)
    return len(duplicates), size


def _publish(run: RunDirectory, files: Sequence[Path]) -> Iterator[str]:
    """Send MLflow the files, unless a job is using the run: it is sending its own records then."""
    if not (run.path / OUTBOX_FILE).exists():
        return
    try:
        run.claim(None)
    except UserError:
        yield f"{run.path} is in use by a running job: MLflow gets the report when this is given again after it"
        return
    with contextlib.closing(run):
        publish(run.path, files, "audit")
    yield "MLflow has it, too"


def _facts(run: RunDirectory, config: Config, found: Audit) -> dict[str, Any]:
    """What the page says about the run."""
    return {
        "data_set": found.index.name,
        "run": str(run.path.absolute()),
        "method": config.method.name,
        "labels": found.samples.label_set or "as in the shards",
        "model": config.model.name,
        "seed": config.run.seed,
        "judged": found.samples.when,
        "written": f"{datetime.date.today().isoformat()}, nldist {__version__}",
    }


def _graph(config: Config, index: Index) -> np.ndarray | None:
    """The neighbour graph that the run's stages have mined, if they have."""
    images = Data(index, index, index.label, None).fingerprint(labels=False)
    directory = stage_directories(config, images).get(MINE.name)
    file = directory / "tables" / GRAPH_FILE if directory else None
    return open_graph(file) if file is not None and file.exists() else None


def _duplicates(found: Audit, reader: Reader, graph: np.ndarray | None) -> list[Duplicates]:
    groups = exact(found.index, found.samples.given, found.rank)
    # Of shards elsewhere nearly all would be copied for it.
    if graph is not None and not any(map(is_url, found.index.shards)):
        groups += near(graph, found.samples.given, found.rank, reader, _MAX_PAIRS)
    return sorted(groups, key=lambda group: int(found.rank[group.ids[0]]))


def _write_duplicates(path: Path, found: Audit, groups: Iterable[Duplicates]) -> None:
    """A row per image: number of its group, kind, key, given."""
    groups, classes = list(groups), found.index.classes
    keys = iter(found.index.keys([id_ for group in groups for id_ in group.ids]))
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("group", "kind", "key", "given"))
        for number, group in enumerate(groups, start=1):
            kind = "exact" if group.exact else "near"
            rows.writerows((number, kind, next(keys), classes[found.samples.given[id_]]) for id_ in group.ids)


def _refused(index: Index) -> list[dict[str, str]]:
    """Path and reason of the images that the split was made without."""
    file = index.root / "rejected.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return [row for row in rows if row["split"] == index.split]
