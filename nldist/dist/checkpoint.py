"""Checkpoints: written aside by all ranks and renamed whole, the newest k kept, readable at another world size.

RUN/checkpoints/e0003-p01-s000000200/   epoch 3, pass 1, 200 steps done
    shared.pt         what is the same on every rank, written by rank 0
    rank-00001.pt     what differs (batch-norm buffers within a pass)
    tables/           per-sample state, by id
    checksums.json    of all these files
RUN/checkpoints/damaged/                 those in which a start found damage
"""

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nldist.dist.agree import every_line, first_problem, on_all
from nldist.dist.checksums import Files, differs, read_sums, write_sums
from nldist.dist.table import SampleTable, slices_for
from nldist.dist.world import World
from nldist.errors import UserError, one_line
from nldist.files import free_name, replacing
from nldist.randomness import REVISION

SHARED_FILE = "shared.pt"
_log = logging.getLogger(__name__)
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
        files = Files(final.with_name(final.name + ".part"))
        failure = f"checkpoint {final} was not saved"
        on_all(lambda: self._prepare(files.directory), self._world, failure)
        on_all(lambda: self._write(files, position, shared, rank, table), self._world, failure)
        sums = [json.loads(line) for line in every_line(json.dumps(files.sums), self._world)]
        on_all(lambda: self._finish(files.directory, final, sums), self._world, failure)
        return final

    def _prepare(self, aside: Path) -> None:
        if self._world.is_main:
            for leftover in [*self._directory.glob("*.part"), *self._directory.glob("*.gone")]:
                shutil.rmtree(leftover)
            (aside / "tables").mkdir(parents=True)

    def _write(
        self, files: Files, position: Position, shared: Mapping[str, Any], rank: Mapping[str, Any], table: SampleTable
    ) -> None:
        if self._world.is_main:
            facts = {
                "position": asdict(position),
                "world_size": self._world.size,
                "fingerprint": self._fingerprint,
                "draws": REVISION,
            }
            with files.create(SHARED_FILE) as file:
                torch.save(dict(shared) | facts, file)
        with files.create(_rank_file(self._world.rank)) as file:
            torch.save(rank, file)
        table.save(files, "tables")

    def _finish(self, aside: Path, final: Path, sums: Iterable[dict[str, tuple[int, int]]]) -> None:
        if not self._world.is_main:
            return
        write_sums(aside, ChainMap(*sums))
        if final.exists():  # saved before a restart: the same state
            shutil.rmtree(aside)
        else:
            os.replace(aside, final)
            _sync(self._directory)
        self._prune()

    def latest(self) -> Path | None:
        """The newest whole checkpoint that this world can go on from. A collective.

        Each rank looks through the files that it would read. Where one finds damage, all go on to the next older
        checkpoint, and the damaged one is kept in `damaged/`. Another world size goes on from an epoch's end only, or
        within a pass that any can go on with (`any_world`); what an nldist of other draws has saved goes on from an
        epoch's end. Newer checkpoints, which it has to leave behind, are removed: they would not belong to the run that
        goes on.

        Raises:
            UserError: no checkpoint is whole. All are left as they are.
        """
        fitting = [path for path in reversed(self._complete()) if self._fits(path)] if self._world.is_main else []
        damaged: dict[Path, str] = {}
        choice = None
        for path in self._world.broadcast_object(fitting):
            problem = first_problem(find_damage(path, self._world.rank, self._world.size), self._world)
            if problem is None:
                choice = path
                break
            damaged[path] = problem
        if damaged and choice is None:
            path, problem = next(iter(damaged.items()))
            raise UserError(f"{path} is damaged ({problem}), as is what is older; delete {path.parent} to begin again")
        on_all(lambda: self._leave(choice, damaged), self._world, f"checkpoints in {self._directory} cannot be moved")
        return choice

    def _leave(self, choice: Path | None, damaged: Mapping[Path, str]) -> None:
        """Put aside what is damaged and remove what is newer than the choice."""
        if not self._world.is_main:
            return
        for path, problem in damaged.items():
            kept = free_name(self._directory / "damaged" / path.name)
            kept.parent.mkdir(exist_ok=True)
            os.replace(path, kept)
            _log.warning("checkpoint %s is damaged (%s): left, and kept in %s", path.name, problem, kept)
        for path in self._complete():
            if choice is None or path > choice:
                _log.info(
                    "%s, within an epoch, is of another number of ranks or was drawn otherwise: left behind", path
                )
                _remove(path)

    def load(self, path: Path, table: SampleTable) -> tuple[Position, dict[str, Any], dict[str, Any] | None]:
        """Read a checkpoint: its position, the shared state, and this rank's own (None at another world size).

        Raises:
            UserError: it was saved for other samples or labels, or rows of its tables are missing.
        """
        shared = load_file(path / SHARED_FILE)
        if shared["fingerprint"] != self._fingerprint:
            raise UserError(
                f"{path} is of a run on other samples or labels than data.root has now; set another run.dir"
            )
        try:
            table.load(path / "tables")
        except ValueError as error:
            raise UserError(f"{error}; move {path} away to go on from the one before") from error
        position, rank = Position(**shared["position"]), None
        if shared["world_size"] == self._world.size:
            rank = load_file(path / _rank_file(self._world.rank))
        fits = rank is not None or position.at_epoch_edge or shared.get("any_world", False)
        assert fits, "a checkpoint within an epoch fits its own world only"
        return position, shared, rank

    def _fits(self, path: Path) -> bool:
        """Whether this world can go on from a checkpoint, as far as can be told before it is read."""
        try:
            if _position(path).at_epoch_edge:
                return True
            shared = load_file(path / SHARED_FILE, mmap=True)
            if _world_size(_names(path)) != self._world.size and not shared.get("any_world", False):
                return False
            # The rest of an epoch that was begun with other draws is not what is left of it.
            return bool(shared.get("draws", 1) == REVISION)
        except (ValueError, UserError):  # it is damaged: to be found so, not to be removed as another world's
            return True

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


def save_file(value: Any, path: Path) -> None:
    """torch.save to `path`, which is replaced as a whole."""
    with replacing(path) as aside, aside.open("wb") as file:
        torch.save(value, file)


def load_file(path: Path, *, mmap: bool = False) -> Any:
    """torch.load of plain tensors and containers only, to the CPU; with `mmap` tensors are read when they are used.

    Raises:
        UserError: there is no such file, it is damaged, or it holds something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read, it may be damaged: {one_line(error)}") from error


def newest_shared(directory: Path) -> dict[str, Any] | None:
    """What the newest readable checkpoint in `directory` holds for all ranks, tensors unread; None: there is none."""
    for file in sorted(directory.glob(f"e*/{SHARED_FILE}"), reverse=True):
        with contextlib.suppress(UserError):
            shared: dict[str, Any] = load_file(file, mmap=True)
            return shared
    return None


def find_damage(path: Path, rank: int, size: int) -> str | None:
    """What is wrong with the files of a checkpoint that rank `rank` of `size` reads; None: nothing.

    Releases that wrote no checksums: only what keeps a file from being read at all.
    """
    try:
        sums, names = read_sums(path), _names(path)
    except ValueError as error:
        return str(error)
    needed = [SHARED_FILE, *slices_for(names, rank, size)]
    if _world_size(names) == size:
        needed.append(_rank_file(rank))
    for name in needed:
        problem = _unreadable(path / name) if sums is None else differs(path / name, *sums[name])
        if problem:
            return f"{name}: {problem}"
    return None


def _unreadable(path: Path) -> str | None:
    try:
        np.load(path, mmap_mode="r", allow_pickle=False) if path.suffix == ".npy" else load_file(path, mmap=True)
    except (UserError, OSError, EOFError, ValueError) as error:
        return one_line(error)
    return None


def _names(path: Path) -> list[str]:
    """The files of a checkpoint, below it.

    Raises:
        ValueError: its checksums, which name them, are damaged.
    """
    sums = read_sums(path)
    return [file.relative_to(path).as_posix() for file in path.rglob("*.*")] if sums is None else list(sums)


def _world_size(names: Iterable[str]) -> int:
    """How many ranks have written a checkpoint of these files."""
    return sum(name.startswith("rank-") for name in names)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"
