"""A plan's batches on the device: plan -> read -> decode -> collate in worker processes -> device."""

import atexit
import itertools
import logging
import multiprocessing
import signal
import time
import traceback
import uuid
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import get_worker_info

from nldist.data.cache import ShardCache
from nldist.data.decoded import DecodedCache
from nldist.data.index import Index
from nldist.data.loose import LooseImages, LooseReader
from nldist.data.plan import Part, Plan
from nldist.data.reader import OnBad, Reader
from nldist.data.transfer import BufferPool, forget
from nldist.errors import UserError

# webdataset's secure mode: no `pipe:` commands, no rewriting of addresses through the environment, no pickle.
webdataset.utils.enforce_security = True

_log = logging.getLogger(__name__)


@dataclass
class Batch:
    """One role's samples of one step, on the device.

    Attributes:
        images: uint8 (b, 3, H, W) RGB, channels last in memory, padded with zeros at the bottom and right.
        sizes: int64 (b, 2), each image's height and width within `images`.
        ids: int64 (b,).
        draws: int64 (b,), names this occurrence of each sample within the epoch (see `plan.Part`).
        labels: int64 (b,).
        bad: what was wrong with the samples of the step that were left out, in their order.
    """

    images: Tensor
    sizes: Tensor
    ids: Tensor
    draws: Tensor
    labels: Tensor
    bad: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        return [self.images, self.sizes, self.ids, self.draws, self.labels]


class Stream:
    """Iterates over the steps of a plan, as a `Batch` per role.

    Args:
        index: the split, or the images outside of data sets, to read.
        labels: int (N,), one label per id; the index's given labels if None.
        plan: which samples each step has.
        num_workers: processes that read and decode; 0 does it in this one.
        device: where the batches go. On a GPU one batch is copied ahead, from pinned memory.
        start_step: the first step, for resuming within an epoch.
        on_bad: "skip" leaves damaged records out and counts them, "refuse" raises.
        max_side: larger images are reduced until their longer side has this many pixels.
        cache: where remote shards are copied.
        decoded: where decoded images are kept; None: nowhere.
        prefetch: how many steps each worker works ahead.

    Attributes:
        wait_seconds: how long the consumer has waited for batches.
        num_images: images delivered.
        num_bad: images left out.
        first_bad: what was wrong with the first of them.

    Iterating raises UserError for a missing shard and, with on_bad="refuse", for a damaged record.
    """

    def __init__(
        self,
        index: Index | LooseImages,
        labels: np.ndarray | None,
        plan: Plan,
        *,
        num_workers: int = 0,
        device: torch.device | None = None,
        start_step: int = 0,
        on_bad: OnBad = "skip",
        max_side: int = 512,
        cache: ShardCache | None = None,
        decoded: DecodedCache | None = None,
        prefetch: int = 2,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.wait_seconds, self.num_images, self.num_bad = 0.0, 0, 0
        self.first_bad: str | None = None
        self._labels = index.label if labels is None else labels
        self._steps = range(start_step, plan.num_steps)
        self._source = _Source(plan, self._steps)
        self._reader: Reader | LooseReader
        if isinstance(index, LooseImages):
            self._reader = LooseReader(index, on_bad, max_side)
        else:
            self._reader = Reader(index, on_bad, max_side, cache, decoded)
        self._num_workers, self._prefetch = min(num_workers, len(self._steps)), prefetch

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        loads = self._loads()
        try:
            if self.device.type == "cuda":
                yield from self._ahead(loads)
            else:
                for load in loads:
                    yield self._on_device(load)
        finally:
            loads.close()

    def _loads(self) -> Generator["_Load", None, None]:
        """What the workers loaded, in the order of steps, after reporting what was bad."""
        name = uuid.uuid4().hex
        loads = iter(self._loader(name))
        try:
            for step in self._steps:
                begin = time.perf_counter()
                load: _Load = next(loads)
                self.wait_seconds += time.perf_counter() - begin
                if load.error is not None:
                    raise UserError(load.error)
                assert load.step == step, f"step {load.step} came where {step} was due"
                self._count(load)
                yield load
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # or its frames would keep the workers alive
            raise
        finally:
            loads.close()
            forget(name)

    def _loader(self, name: str) -> webdataset.WebLoader:
        return webdataset.WebLoader(
            webdataset.DataPipeline(self._source, _Loading(self._reader, name)),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_leave_signals_to_the_rank,
            # Its own generator: the loader must not draw from the global one that training resumes with.
            generator=torch.Generator(),
        )

    def _count(self, load: "_Load") -> None:
        for text in itertools.chain(*load.bad.values()):
            if self.first_bad is None:
                self.first_bad = text
                _log.warning("left out: %s", text)
            self.num_bad += 1
        self.num_images += sum(len(part.ids) for _, part in load.facts.values())

    def _ahead(self, loads: Iterable["_Load"]) -> Iterator[dict[str, Batch]]:
        """Batches on the GPU, copied on a stream of their own while the one before is worked on."""
        side: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        waiting: tuple[dict[str, Batch], torch.cuda.Event] | None = None
        for load in loads:
            with torch.cuda.stream(side):
                copied = self._on_device(load), side.record_event()
            if waiting is not None:
                yield _arrived(*waiting)
            waiting = copied
        if waiting is not None:
            yield _arrived(*waiting)

    def _on_device(self, load: "_Load") -> dict[str, Batch]:
        return {role: self._batch(pixels, *load.facts[role], load.bad[role]) for role, pixels in load.pixels.items()}

    def _batch(self, pixels: Tensor, sizes: np.ndarray, part: Part, bad: list[str]) -> Batch:
        facts = torch.from_numpy(np.array([*sizes.T, *part, self._labels[part.ids]], np.int64))
        if self.device.type == "cuda":
            facts = facts.pin_memory()
        pixels, facts = (tensor.to(self.device, non_blocking=True) for tensor in (pixels, facts))
        return Batch(pixels.permute(0, 3, 1, 2), facts[:2].T, facts[2], facts[3], facts[4], bad)


@dataclass
class _Load:
    """What a worker sends for one step: pixels in shared memory, the rest by value."""

    step: int
    pixels: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, tuple[np.ndarray, Part]] = field(default_factory=dict)
    bad: dict[str, list[str]] = field(default_factory=dict)
    error: str | None = None

    def pin_memory(self) -> "_Load":
        """Called by the loader where the batches go to a GPU."""
        return replace(self, pixels={role: pixels.pin_memory() for role, pixels in self.pixels.items()})


class _Source:
    """The source of the pipeline: this worker's steps (worker w of n has every n-th), and their parts."""

    def __init__(self, plan: Plan, steps: range) -> None:
        self.plan, self.steps = plan, steps

    def __call__(self) -> Iterator[tuple[int, dict[str, Part]]]:
        worker = get_worker_info()
        mine = self.steps if worker is None else self.steps[worker.id :: worker.num_workers]
        for step in mine:
            yield step, self.plan.step(step)


class _Loading:
    """The pipeline's stage that reads, decodes and collates each step's parts."""

    def __init__(self, reader: Reader | LooseReader, name: str) -> None:
        self.reader, self.name = reader, name

    def __call__(self, steps: Iterable[tuple[int, dict[str, Part]]]) -> Iterator[_Load]:
        pool = BufferPool(self.name) if get_worker_info() else None
        try:
            for step, parts in steps:
                yield (load := self._load(step, parts, pool))
                if load.error is not None:
                    return  # the run ends: nothing is read ahead, nor tried again
        finally:
            self.reader.close()

    def _load(self, step: int, parts: dict[str, Part], pool: BufferPool | None) -> _Load:
        load = _Load(step)
        for role, part in parts.items():
            try:
                images = self.reader.read(part.ids, pool.empty if pool else None)
            except UserError as error:
                # Sent as a message: raised here, it would reach the user wrapped in the worker's traceback.
                return _Load(step, error=str(error))
            load.pixels[role] = pool.pack(images.pixels) if pool else images.pixels
            load.facts[role] = images.sizes, Part(part.ids[images.kept], part.draws[images.kept])
            load.bad[role] = images.bad
        return load


def _leave_signals_to_the_rank(_worker: int) -> None:
    """torchrun and Slurm signal whole process groups: the rank still needs its workers until it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """End workers that an error has left behind: they do not heed the SIGTERM with which multiprocessing would."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _arrived(batches: dict[str, Batch], copied: torch.cuda.Event) -> dict[str, Batch]:
    """Make the current stream wait for the copies, and keep their memory until it has used them."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for batch in batches.values():
        for tensor in batch.tensors():
            tensor.record_stream(current)
    return batches
