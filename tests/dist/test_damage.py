"""Checkpoints whose files were cut short, changed or lost: found on any rank, left by all, and kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nldist.dist import checkpoint
from nldist.dist.checkpoint import Checkpoints, Position, find_damage, newest_shared
from nldist.dist.checksums import CHECKSUMS_FILE
from nldist.dist.table import SampleTable
from nldist.dist.world import World
from nldist.errors import UserError
from tests.ranks import run_ranks

N = 10
OLDER, NEWER = Position(1), Position(1, 0, 5)
FILES = ("shared.pt", "rank-00001.pt", "tables/loss.000000000005-000000000010.npy", CHECKSUMS_FILE)


def build(world: World, directory: Path) -> tuple[Checkpoints, SampleTable]:
    table = SampleTable(N, world)
    table.add("loss", torch.float32)
    return Checkpoints(directory, world, keep=3, fingerprint="these"), table


def save(world: World, directory: Path, *positions: Position) -> None:
    checkpoints, table = build(world, directory)
    for position in positions:
        table["loss"].rows[:] = position.step
        weights = torch.arange(100.0) + position.step
        checkpoints.save(position, {"weights": weights}, {"rank": world.rank, "step": position.step}, table)


def resume(world: World, directory: Path, blind: int | None = None) -> tuple[str, int, float, int] | str:
    """What rank `world.rank` goes on from; rank `blind` cannot read its tables."""
    checkpoints, table = build(world, directory)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == blind:
            patch.setattr(checkpoint, "differs", lambda path, *sums: "Input/output error")
        try:
            path = checkpoints.latest()
        except UserError as error:
            return str(error)
    if path is None:
        return "nothing"
    _, shared, rank = checkpoints.load(path, table)
    loss = table["loss"].gather()
    assert (loss == loss[0]).all()
    return path.name, int(shared["weights"][0]), float(loss[0]), (rank or shared).get("step", -1)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def lose(path: Path) -> None:
    path.unlink()


def contents(directory: Path) -> dict[str, bytes]:
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*.*")}


# Without its checksums it is as a release before wrote it.
HARMS = [(file, harm) for file in FILES for harm in (cut, empty, flip, lose) if (file, harm) != (CHECKSUMS_FILE, lose)]


@pytest.mark.parametrize(("file", "harm"), HARMS)
def test_all_go_on_from_the_older_one_and_the_damaged_one_is_kept(
    file: str, harm: Callable[[Path], None], tmp_path: Path
) -> None:
    run_ranks(save, 2, tmp_path, OLDER, NEWER)
    assert run_ranks(resume, 2, tmp_path) == [(NEWER.name, 5, 5.0, 5)] * 2
    harm(tmp_path / NEWER.name / file)
    before = contents(tmp_path / NEWER.name)
    assert run_ranks(resume, 2, tmp_path) == [(OLDER.name, 0, 0.0, 0)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", OLDER.name]
    assert contents(tmp_path / "damaged" / NEWER.name) == before
    run_ranks(save, 2, tmp_path, NEWER)
    assert run_ranks(resume, 2, tmp_path) == [(NEWER.name, 5, 5.0, 5)] * 2


def test_damage_that_one_rank_alone_sees_counts_for_all(tmp_path: Path) -> None:
    run_ranks(save, 3, tmp_path, Position(2), Position(3))
    flip(tmp_path / "e0003-p00-s000000000" / "rank-00002.pt")
    first, *others = run_ranks(resume, 3, tmp_path, 1)
    assert "e0003-p00-s000000000 is damaged (rank 1: shared.pt: Input/output error), as is what is older" in first
    assert others == [first] * 2
    assert not (tmp_path / "damaged").exists(), "nothing is changed where nothing is whole"
    assert run_ranks(resume, 3, tmp_path) == [("e0002-p00-s000000000", 0, 0.0, 0)] * 3


def test_damage_at_the_same_place_twice_keeps_both(tmp_path: Path) -> None:
    for number in range(1, 4):
        save(World.single(), tmp_path, OLDER, NEWER)
        flip(tmp_path / NEWER.name / "shared.pt")
        resume(World.single(), tmp_path)
        kept = [NEWER.name, f"{NEWER.name}-2", f"{NEWER.name}-3"][:number]
        assert sorted(path.name for path in (tmp_path / "damaged").iterdir()) == kept


@pytest.mark.parametrize("world_size", [1, 3])
def test_at_another_world_size_it_is_the_epoch_s_end_before(world_size: int, tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, OLDER, Position(2), Position(2, 0, 5))
    flip(tmp_path / "e0002-p00-s000000000" / FILES[2])
    assert run_ranks(resume, world_size, tmp_path) == [(OLDER.name, 0, 0.0, -1)] * world_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", OLDER.name]


def test_no_byte_of_any_file_changes_unnoticed(tmp_path: Path) -> None:
    save(World.single(), tmp_path, OLDER)
    path = tmp_path / OLDER.name
    assert find_damage(path, 0, 1) is None
    for name, content in contents(path).items():
        for place in range(0, len(content), 1 + len(content) // 400):
            (path / name).write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            assert name in (find_damage(path, 0, 1) or ""), (name, place)
        (path / name).write_bytes(content)
    assert find_damage(path, 0, 1) is None


def without_checksums(directory: Path) -> None:
    """As a release before has written them."""
    for file in directory.rglob(CHECKSUMS_FILE):
        file.unlink()


def test_checkpoints_of_the_release_before_are_read(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, OLDER, NEWER)
    without_checksums(tmp_path)
    assert run_ranks(resume, 2, tmp_path) == [(NEWER.name, 5, 5.0, 5)] * 2
    assert run_ranks(resume, 3, tmp_path) == [(OLDER.name, 0, 0.0, -1)] * 3


@pytest.mark.parametrize("harm", [cut, empty])
@pytest.mark.parametrize("file", FILES[:3])
def test_one_of_the_release_before_that_is_cut_is_left(file: str, harm: Callable[[Path], None], tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, OLDER, NEWER)
    without_checksums(tmp_path)
    harm(tmp_path / NEWER.name / file)
    assert run_ranks(resume, 2, tmp_path) == [(OLDER.name, 0, 0.0, 0)] * 2
    assert (tmp_path / "damaged" / NEWER.name / file).exists()


def test_rows_that_are_missing_in_one_of_the_release_before_are_told(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path, OLDER)
    without_checksums(tmp_path)
    lose(tmp_path / OLDER.name / FILES[2])
    with pytest.raises(UserError, match=r"column loss holds 5 of 10 owned rows; move .* away to go on"):
        resume(World.single(), tmp_path)


def test_the_newest_shared_state_that_can_be_read(tmp_path: Path) -> None:
    assert newest_shared(tmp_path) is None
    save(World.single(), tmp_path, OLDER, NEWER)
    for name, step in ((NEWER.name, 5), (OLDER.name, 0)):
        shared = newest_shared(tmp_path)
        assert shared is not None
        assert shared["weights"][0] == step
        cut(tmp_path / name / "shared.pt")
    assert newest_shared(tmp_path) is None
