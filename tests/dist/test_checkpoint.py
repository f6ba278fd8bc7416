import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch

from nldist.dist.checkpoint import Checkpoints, Position, load_file
from nldist.dist.checksums import Files
from nldist.dist.table import SampleTable
from nldist.dist.world import World
from nldist.errors import UserError
from tests.ranks import run_ranks


def table(world: World) -> SampleTable:
    table = SampleTable(10, world)
    table.add("loss", torch.float32)
    return table


def save(world: World, directory: Path, *positions: Position) -> None:
    checkpoints = Checkpoints(directory, world, keep=2, fingerprint="these")
    for position in positions:
        rows = table(world)
        rows["loss"].rows[:] = position.epoch
        checkpoints.save(position, {"weights": torch.ones(3)}, {"rank": world.rank}, rows)


def latest(world: World, directory: Path) -> tuple[str, object]:
    checkpoints = Checkpoints(directory, world, keep=2, fingerprint="these")
    path = checkpoints.latest()
    assert path is not None
    position, shared, rank = checkpoints.load(path, table(world))
    assert position.name == path.name
    assert torch.equal(shared["weights"], torch.ones(3))
    return path.name, rank


def test_each_rank_gets_its_own_part_back(tmp_path: Path) -> None:
    run_ranks(save, 3, tmp_path, Position(1, 0, 0), Position(1, 2, 7))
    assert run_ranks(latest, 3, tmp_path) == [("e0001-p02-s000000007", {"rank": r}) for r in range(3)]


def test_another_world_size_takes_the_last_epoch_edge_and_drops_what_is_newer(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, Position(1), Position(2), Position(2, 1, 5), Position(2, 1, 10))
    assert run_ranks(latest, 3, tmp_path) == [("e0002-p00-s000000000", None)] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e0002-p00-s000000000"]


def test_what_was_drawn_otherwise_goes_on_from_an_epoch_edge(tmp_path: Path) -> None:
    """As a run of nldist 0.1, whose checkpoints do not say how they drew."""
    save(World.single(), tmp_path, Position(1), Position(1, 2, 7))
    file = tmp_path / "e0001-p02-s000000007" / "shared.pt"
    shared = torch.load(file, weights_only=True)
    assert shared.pop("draws") > 1
    torch.save(shared, file)
    assert latest(World.single(), tmp_path) == ("e0001-p00-s000000000", {"rank": 0})


def test_only_the_newest_are_kept_and_the_last_epoch_edge(tmp_path: Path) -> None:
    save(World.single(), tmp_path, Position(1), Position(1, 0, 5), Position(1, 0, 10), Position(1, 1, 5))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "e0001-p00-s000000000",
        "e0001-p00-s000000010",
        "e0001-p01-s000000005",
    ]


@pytest.mark.parametrize("operation", ["rmtree", "replace"])
@pytest.mark.parametrize("call", range(6))
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(
    operation: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill is simulated by an exception, once before and once halfway through the operation."""
    save(World.single(), tmp_path, Position(1), Position(1, 0, 5), Position(1, 0, 10))
    module = shutil if operation == "rmtree" else os
    original, calls = getattr(module, operation), 0

    def killed(path: Path, *arguments: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call // 2 + 1:
            if operation == "rmtree" and call % 2:
                (path / "shared.pt").unlink(missing_ok=True)
            raise KeyboardInterrupt
        original(path, *arguments, **options)

    monkeypatch.setattr(module, operation, killed)
    with contextlib.suppress(KeyboardInterrupt):
        save(World.single(), tmp_path, Position(1, 0, 15), Position(1, 0, 15), Position(1, 0, 20))
    monkeypatch.undo()
    name, _ = latest(World.single(), tmp_path)
    assert name >= "e0001-p00-s000000005"
    save(World.single(), tmp_path, Position(2))
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".part", ".gone")]


def test_a_half_written_checkpoint_is_not_seen(tmp_path: Path) -> None:
    save(World.single(), tmp_path, Position(1))
    (tmp_path / "e0002-p00-s000000000.part").mkdir()
    assert latest(World.single(), tmp_path)[0] == "e0001-p00-s000000000"


def save_on_a_full_disk(world: World, directory: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr(SampleTable, "save", _no_space)
        try:
            save(world, directory, Position(1))
        except UserError as error:
            return str(error)
    return "saved"


def _no_space(self: SampleTable, files: Files, folder: str) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(save_on_a_full_disk, 2, tmp_path)
    assert first == second
    assert "was not saved: rank 1: [Errno 28] No space left on device; free some space" in first
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".part")]


def test_state_of_other_samples_is_refused(tmp_path: Path) -> None:
    save(World.single(), tmp_path, Position(1))
    checkpoints = Checkpoints(tmp_path, World.single(), keep=2, fingerprint="others")
    path = checkpoints.latest()
    assert path is not None
    with pytest.raises(UserError, match="other samples or labels"):
        checkpoints.load(path, SampleTable(3, World.single()))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("pwned",)


def test_a_checkpoint_is_data_not_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": Payload()}, tmp_path / "shared.pt")
    with pytest.raises(UserError, match=r"shared.pt cannot be read, it may be damaged: .*weights_only"):
        load_file(tmp_path / "shared.pt")
    assert not (tmp_path / "pwned").exists()
