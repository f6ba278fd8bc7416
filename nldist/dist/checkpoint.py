"""Checkpoints: written aside by all ranks and renamed whole, the newest k kept, readable at another world size.

RUN/checkpoints/e0003-p01-s000000200/   epoch 3, pass 1, 200 steps done
    shared.pt         what is the same on every rank, written by rank 0
    rank-00001.pt     what differs (batch-norm buffers within a pass)
    tables/           per-sample state, by id
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nldist.dist.table import SampleTable
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.files import replacing

_NAME = re.compile(r"e(\d+)-p(\d+)-s(\d+)")


@dataclass(frozen=True, order=True)
class Position:
    """How far a run is: everything before this epoch, pass and step is done."""

    epoch: int = 0
    pass_index: int = 0
    step: int = 0

    @property
    def at_epoch_edge(self) -> bool:
        """Whether no part of the epoch is done: the state is the same on every rank."""
        return self.pass_index == 0 and self.step == 0

    @property
    def name(self) -> str:
        """The checkpoint directory's name; sorts in order of progress."""
        return f"e{self.epoch:04d}-p{self.pass_index:02d}-s{self.step:09d}"


class Checkpoints:
    """The checkpoints of one run directory, for the samples and labels that `fingerprint` names."""

    def __init__(self, directory: Path, world: World, keep: int, fingerprint: str) -> None:
        self._directory, self._world, self._keep, self._fingerprint = directory, world, keep, fingerprint

    def save(self, position: Position, shared: Mapping[str, Any], rank: Mapping[str, Any], table: SampleTable) -> Path:
        """Write one checkpoint; it exists whole or not at all. A collective.

        Raises:
            UserError: the file system refused (full disk, no permission), on any rank.
        """
        final = self._directory / position.name
        aside = final.with_name(final.name + ".part")
        self._all_ok(lambda: self._prepare(aside))
        self._all_ok(lambda: self._write(aside, position, shared, rank, table))
        if self._world.is_main:
            if final.exists():  # saved before a restart: the same state
                shutil.rmtree(aside)
            else:
                os.replace(aside, final)
                _sync(self._directory)
            self._prune()
        self._world.barrier()
        return final

    def _prepare(self, aside: Path) -> None:
        if self._world.is_main:
            for leftover in [*self._directory.glob("*.part"), *self._directory.glob("*.gone")]:
                shutil.rmtree(leftover)
            (aside / "tables").mkdir(parents=True)

    def _write(
        self, aside: Path, position: Position, shared: Mapping[str, Any], rank: Mapping[str, Any], table: SampleTable
    ) -> None:
        if self._world.is_main:
            facts = {
                "position": asdict(position),
                "world_size": self._world.size,
                "fingerprint": self._fingerprint,
            }
            _save(dict(shared) | facts, aside / "shared.pt")
        _save(rank, aside / f"rank-{self._world.rank:05d}.pt")
        table.save(aside / "tables")

    def _all_ok(self, write: Callable[[], None]) -> None:
        """Run `write` on every rank; if it failed on one, fail on all with that rank's reason."""
        problem = None
        try:
            write()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            problem = f"rank {self._world.rank}: {error}"
        flags = torch.zeros(self._world.size)
        flags[self._world.rank] = problem is not None
        self._world.all_reduce(flags)
        if problem or flags.any():
            other = f"rank {int(flags.argmax())} could not write its part"
            raise UserError(f"checkpoint in {self._directory} was not saved: {problem or other}; free some space")

    def latest(self) -> Path | None:
        """The newest checkpoint that this world can go on from; rank 0 decides. A collective.

        Another world size goes on from an epoch's end only. Newer checkpoints, which it has to leave behind,
        are removed: they would not belong to the run that goes on from here.
        """
        choice = None
        if self._world.is_main:
            complete = self._complete()
            choice = next((p for p in reversed(complete) if self._fits(p)), None)
            for path in complete[complete.index(choice) + 1 if choice else 0 :]:
                _remove(path)
        return self._world.broadcast_object(choice)

    def load(self, path: Path, table: SampleTable) -> tuple[Position, dict[str, Any], dict[str, Any] | None]:
        """Read a checkpoint: its position, the shared state, and this rank's own (None at another world size).

        Raises:
            UserError: it was saved for other samples or labels.
        """
        shared = load_file(path / "shared.pt")
        if shared["fingerprint"] != self._fingerprint:
            raise UserError(
                f"{path} is of a run on other samples or labels than data.root has now; set another run.dir"
            )
        table.load(path / "tables")
        position, rank = Position(**shared["position"]), None
        if shared["world_size"] == self._world.size:
            rank = load_file(path / f"rank-{self._world.rank:05d}.pt")
        assert rank is not None or position.at_epoch_edge, "a checkpoint within an epoch fits its own world only"
        return position, shared, rank

    def _fits(self, path: Path) -> bool:
        return _position(path).at_epoch_edge or len(list(path.glob("rank-*.pt"))) == self._world.size

    def _complete(self) -> list[Path]:
        return sorted(p for p in self._directory.glob("e*") if _NAME.fullmatch(p.name))

    def _prune(self) -> None:
        """Keep the newest k, and the newest at an epoch's edge, which another world size needs."""
        paths = self._complete()
        edges = [p for p in paths if _position(p).at_epoch_edge]
        for path in set(paths[: -self._keep]) - set(edges[-1:]):
            _remove(path)


def _remove(path: Path) -> None:
    """Rename first: a directory that is being deleted must not look like a checkpoint."""
    gone = path.with_name(path.name + ".gone")
    os.replace(path, gone)
    shutil.rmtree(gone)


def _sync(directory: Path) -> None:
    """Make renames in a directory survive the loss of the node."""
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _position(path: Path) -> Position:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return Position(*map(int, match.groups()))


def _save(value: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def save_file(value: Any, path: Path) -> None:
    """torch.save to `path`, which is replaced as a whole."""
    with replacing(path) as aside:
        _save(value, aside)


def load_file(path: Path, *, mmap: bool = False) -> Any:
    """torch.load of plain tensors and containers only, to the CPU; with `mmap` tensors are read when they are used."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
