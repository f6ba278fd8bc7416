from pathlib import Path

import numpy as np
import pytest
import torch

import nldist.dist.table as table_module
from nldist.dist.checksums import Files
from nldist.dist.table import SampleTable
from nldist.dist.world import World
from tests.memory import peak_growth
from tests.ranks import run_ranks

N = 23


def filled(world: World) -> SampleTable:
    table = SampleTable(N, world)
    table.add("loss", torch.float32, fill=np.nan)
    table.add("soft", torch.float16, (3,))
    ids = torch.arange(table.owned.start, table.owned.stop)
    table["loss"][ids.flip(0)] = ids.flip(0).double()
    table["soft"][ids] = ids[:, None] + torch.tensor([0, 100, 200])
    return table


def save(world: World, directory: Path) -> None:
    filled(world).save(Files(directory), ".")


def load_and_gather(world: World, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    table = SampleTable(N, world)
    table.add("loss", torch.float32, fill=np.nan)
    table.add("soft", torch.float16, (3,))
    table.load(directory)
    return table["loss"].gather(), table["soft"].gather()


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 2), (3, 1), (4, 3)])
def test_saved_by_some_ranks_and_loaded_by_others(before: int, after: int, tmp_path: Path) -> None:
    run_ranks(save, before, tmp_path)
    for loss, soft in run_ranks(load_and_gather, after, tmp_path):
        assert loss.tolist() == list(range(N))
        assert soft[:, 1].tolist() == [100 + i for i in range(N)]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_wide_rows_are_read_some_at_a_time(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As test_saved_by_some_ranks..., with two rows of the wide column to a block."""
    run_ranks(save, before, tmp_path)
    for rank in range(after):
        monkeypatch.setattr(table_module, "_BLOCK_BYTES", 12)
        table = SampleTable(N, World(rank, after, rank, torch.device("cpu")))
        table.add("soft", torch.float16, (3,))
        table.load(tmp_path)
        assert table["soft"].rows[:, 2].tolist() == [200 + id_ for id_ in table.owned]


def test_reading_a_wide_column_needs_no_second_copy(tmp_path: Path) -> None:
    def wide() -> SampleTable:
        table = SampleTable(100_000, World.single())
        table.add("soft", torch.float16, (1_000,), fill=1)
        return table

    wide().save(Files(tmp_path), ".")
    table = wide()
    assert peak_growth(lambda: table.load(tmp_path)) < table["soft"].rows.nbytes / 2


def test_missing_rows_are_an_error(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path)
    next(tmp_path.glob("loss.000000000000-*")).unlink()
    with pytest.raises(ValueError, match="column loss holds 12 of 23 owned rows"):
        load_and_gather(World.single(), tmp_path)


def test_reset_and_bytes_per_sample() -> None:
    table = filled(World.single())
    table["loss"].reset()
    assert table["loss"].rows.isnan().all()
    assert table["soft"].rows.any()
    assert table.bytes_per_sample == 4 + 3 * 2


def test_a_column_that_came_later_than_the_checkpoint_keeps_its_fill(tmp_path: Path) -> None:
    save(World.single(), tmp_path)
    table = filled(World.single())
    table.add("newer", torch.int16, fill=-1)
    table.load(tmp_path)
    assert (table["newer"].rows == -1).all()
    next(tmp_path.glob("loss.*")).rename(tmp_path / "loss.000000000000-000000000001.npy")
    with pytest.raises(ValueError, match="column loss holds"):
        table.load(tmp_path)


def fetched(world: World, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> bool:
    """Rank r asks for r * count rows of anybody's, some of them twice."""
    column = SampleTable(N, world).add("value", dtype, shape)
    ids = torch.arange(column.owned.start, column.owned.stop)
    column[ids] = (ids % 2 if dtype == torch.bool else ids).view(-1, *[1] * len(shape)).expand(-1, *shape)
    generator = torch.Generator().manual_seed(world.rank)
    wanted = torch.randint(N, (world.rank * count,), generator=generator)
    rows = column.fetch(wanted)
    expected = (wanted % 2 if dtype == torch.bool else wanted).view(-1, *[1] * len(shape)).expand(-1, *shape)
    return rows.dtype == dtype and rows.shape == (len(wanted), *shape) and torch.equal(rows, expected.to(dtype))


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int16, torch.int64, torch.bool])
def test_rows_of_any_ids_can_be_fetched(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for size in (1, 2, 3, 4):
        assert all(run_ranks(fetched, size, dtype, shape, 9)), size


def test_ids_of_another_owner_are_refused() -> None:
    column = SampleTable(N, World.single()).add("value", torch.float32)
    with pytest.raises(AssertionError, match="another owner"):
        column[torch.tensor([N])]
