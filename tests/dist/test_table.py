from pathlib import Path

import numpy as np
import pytest

from nldist.dist.table import SampleTable
from nldist.dist.world import World
from tests.ranks import run_ranks

N = 23


def filled(world: World) -> SampleTable:
    table = SampleTable(N, world)
    table.add("loss", np.float32, fill=np.nan)
    table.add("soft", np.float16, (3,))
    ids = np.arange(table.owned.start, table.owned.stop)
    table.put("loss", ids[::-1], ids[::-1].astype(np.float32))
    table.put("soft", ids, ids[:, None] + np.array([0, 100, 200]))
    return table


def save(world: World, directory: Path) -> None:
    filled(world).save(directory)


def load_and_gather(world: World, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    table = SampleTable(N, world)
    table.add("loss", np.float32, fill=np.nan)
    table.add("soft", np.float16, (3,))
    table.load(directory)
    return table.gather("loss"), table.gather("soft")


@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 2), (3, 1), (4, 3)])
def test_saved_by_some_ranks_and_loaded_by_others(before: int, after: int, tmp_path: Path) -> None:
    run_ranks(save, before, tmp_path)
    for loss, soft in run_ranks(load_and_gather, after, tmp_path):
        assert loss.tolist() == list(range(N))
        assert soft[:, 1].tolist() == [100 + i for i in range(N)]


def test_missing_rows_are_an_error(tmp_path: Path) -> None:
    run_ranks(save, 2, tmp_path)
    next(tmp_path.glob("loss.000000000000-*")).unlink()
    with pytest.raises(ValueError, match="column loss holds 12 of 23 owned rows"):
        load_and_gather(World.single(), tmp_path)


def test_reset_and_bytes_per_sample() -> None:
    table = filled(World.single())
    table.reset("loss")
    assert np.isnan(table["loss"]).all()
    assert table["soft"].any()
    assert table.bytes_per_sample == 4 + 3 * 2
