"""What a run's networks say of images: files, tars, or a split of a data set."""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nldist import __version__
from nldist.config import Config
from nldist.data.find import Found
from nldist.data.index import Index
from nldist.data.loose import LooseImages, write_places
from nldist.data.plan import Plan, sweep
from nldist.data.stream import Batch, Stream
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.files import replacing
from nldist.passes.data import NodeCaches
from nldist.run.classifier import Classifier, resize_of
from nldist.run.directory import RunDirectory
from nldist.train.meter import Watch
from nldist.train.predictions import SUFFIXES, Rows, Step, append, open_sink, schema_of

_TOLD = 20  # bad images that each rank names as it meets them
_RANKED = 5  # classes that are ranked at least, as in an evaluation: another number may order equal logits otherwise


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        run_dir: whose networks.
        images: files, directories, patterns, tars, or one data set's directory; none: the run's data set.
        split: of the data set; None: the run's data.eval_split.
        out: file for the table, .parquet or .csv; None: CSV to stdout.
        top: how many classes of each image are told.
        probabilities: tell the probabilities of all classes.
        weights: which file of the run.
        resize: shrink images that are in no data set to this short side (pixels); None: as the run's were.
        overrides: of the run's settings.
    """

    run_dir: Path
    images: Sequence[str] = ()
    split: str | None = None
    out: Path | None = None
    top: int = 1
    probabilities: bool = False
    weights: Literal["last", "best"] = "last"
    resize: int | None = None
    overrides: Sequence[str] = ()

    def check(self) -> None:
        """Refuse (UserError) what cannot be written."""
        if self.out is not None and self.out.suffix not in SUFFIXES:
            raise UserError(f"--out {self.out}: give a name that ends in {' or '.join(SUFFIXES)}")
        if self.probabilities and (self.out is None or self.out.suffix != ".parquet"):
            raise UserError("--probabilities needs --out FILE.parquet: each is a list, for which CSV has no cell")
        if self.resize is not None and self.resize < 1:
            raise UserError(f"--resize {self.resize}: give 1 or more pixels")
        if self.out is not None and self.out.exists():
            raise UserError(f"{self.out} exists: choose another name, or remove it")
        if self.out is not None and not self.out.absolute().parent.is_dir():
            raise UserError(f"--out {self.out}: there is no directory {self.out.parent}")


def predict(request: Request) -> tuple[int, int]:
    """Predict; rank 0 writes the table. Returns how many images there were, and how many could not be read.

    Raises:
        UserError: no such run, weights, images or split; an image cannot be read under data.on_bad=refuse; the table
            cannot be written.
    """
    request.check()
    run = RunDirectory(request.run_dir)
    config = run.config(request.overrides)
    with World.start(**config.dist.model_dump()) as world, _work_directory(request.out, world) as work:
        saved = run.load_weights(request.weights)
        if request.top > len(saved["classes"]) or request.top < 1:
            raise UserError(f"--top {request.top}: the run has {len(saved['classes'])} classes")
        images = _images(request, config, saved, work, world)
        task = _Prediction(request, config, Classifier(saved, config, world.device), images, world)
        with _table(request.out, task.schema, work, world) as sink:
            rows = Rows(sink, task.schema, saved["classes"], images.keys)
            task.run(rows)
            rows.flush()
        return len(images), int(world.all_reduce(torch.tensor([task.num_bad])))


@contextlib.contextmanager
def _work_directory(out: Path | None, world: World) -> Iterator[Path]:
    """A directory that all ranks see, beside the table."""
    if world.size > 1 and out is None:
        raise UserError("several ranks need --out FILE, in a directory that all of them see")
    with contextlib.ExitStack() as stack:
        name = ""
        if world.is_main:
            parent, prefix = (None, "nldist-") if out is None else (out.absolute().parent, f".{out.name}.")
            try:
                name = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=prefix))
            except OSError as error:
                raise UserError(f"{out or 'a temporary directory'} cannot be written: {error.strerror}") from None
        yield Path(world.broadcast_object(name))
        world.barrier()  # nobody reads there any more


def _images(request: Request, config: Config, saved: dict[str, Any], work: Path, world: World) -> Index | LooseImages:
    """A data set's split, or what rank 0 has found by the names."""
    data, names = config.data, request.images
    if not names and not data.root.exists():
        raise UserError(f"the run's data set is not in {data.root}; name images, or add data.root=ITS_PLACE")
    roots = [name for name in names if Path(name, "dataset.json").exists()] if names else [str(data.root)]
    if roots and len(names) > 1:
        raise UserError(f"{roots[0]} is a data set: give it alone")
    if roots:
        return Index.open(Path(roots[0]), request.split or data.eval_split, data.cache_dir)
    if request.split is not None:
        raise UserError(f"--split is for a data set, and {names[0]} is none (it has no dataset.json)")
    listing = work / "images.arrow"
    if world.is_main:
        found = Found(names)
        write_places(listing, found)
        for note in found.notes:
            _say(note)
    world.barrier()
    images = LooseImages(listing, request.resize or resize_of(saved, config))
    if not len(images):
        raise UserError(f"no images: {', '.join(names[:3])} have none of a known extension")
    return images


@contextlib.contextmanager
def _table(out: Path | None, schema: Any, work: Path, world: World) -> Iterator[Any]:
    """Where this rank's rows go. Rank 0's are the first of the table, behind which it puts those of the others."""
    parts = [work / f"rank{rank}.parquet" for rank in range(world.size)]
    if not world.is_main:
        with contextlib.closing(open_sink(parts[world.rank], schema)) as sink:
            yield sink
        world.barrier()
        return
    with replacing(out) if out else contextlib.nullcontext(sys.stdout.buffer) as target:
        suffix = out.suffix if out else ".csv"
        with contextlib.closing(open_sink(target, schema, suffix)) as sink:
            yield sink
            world.barrier()
            for part in parts[1:]:
                append(sink, part)


class _Prediction:
    """This rank's share of the images, each once.

    Attributes:
        schema: of the table.
        num_bad: images that could not be read.
    """

    def __init__(
        self, request: Request, config: Config, classifier: Classifier, images: Index | LooseImages, world: World
    ) -> None:
        facts = {"run": str(request.run_dir), "weights": request.weights, "nldist": __version__}
        self.schema = schema_of(classifier.classes, request.top, request.probabilities, facts)
        self._request, self._config, self._classifier, self._world = request, config, classifier, world
        self._images, self.num_bad = images, 0

    def run(self, rows: Rows) -> None:
        """Predict, and add the rows; lines on stderr tell of the progress."""
        plan, world = self._plan(), self._world
        watch = Watch("predict", plan.num_steps, 0, self._config.track.every_seconds)
        stream = self._stream(plan)
        for number, batches in enumerate(stream):
            batch = batches["all"]
            self._tell(batch.bad, stream.first_bad)
            ids = plan.step(number)["all"].ids
            rows.add(answers(self._classifier, ids, batch, self._request.top, self._request.probabilities))
            if watch.due() and world.is_main:
                rates = watch.rates(stream.num_images * world.size, stream.wait_seconds)
                _say(watch.line(number + 1, rates, {}))

    def _plan(self) -> Plan:
        world, batch_size = self._world, self._config.train.eval_batch_size
        return sweep(len(self._images), rank=world.rank, size=world.size, batch_size=batch_size)

    def _stream(self, plan: Plan) -> Stream:
        data = self._config.data
        return Stream(
            self._images,
            None,
            plan,
            num_workers=data.num_workers,
            device=self._world.device,
            on_bad=data.on_bad,
            max_side=data.max_side,
            cache=NodeCaches(data).shards,
        )

    def _tell(self, bad: list[str], first: str | None) -> None:
        for text in bad:
            self.num_bad += 1
            if text != first and self.num_bad <= _TOLD:  # the stream has told of the first one
                _say(f"left out: {text}")


def answers(classifier: Classifier, ids: np.ndarray, batch: Batch, top: int, whole: bool = False) -> Step:
    """What a classifier says of a batch, for which `ids` were asked: of its `top` classes, or the `whole` of them."""
    num_classes = len(classifier.classes)
    seen = np.isin(ids, batch.ids.cpu().numpy(), assume_unique=True)
    if not len(batch):
        none = np.empty((0, num_classes), np.float32)
        return Step(ids, seen, none[:, :top].astype(np.int64), none[:, :top], none if whole else None, batch.bad)
    logits = classifier(batch)
    order = logits.topk(min(max(top, _RANKED), num_classes)).indices[:, :top]
    probabilities = classifier.probabilities(logits)
    best = probabilities.gather(1, order).cpu().numpy()
    return Step(ids, seen, order.cpu().numpy(), best, probabilities.cpu().numpy() if whole else None, batch.bad)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
