"""With real processes: each id once with its own image and label, and equal steps on all ranks."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nldist.data.index import Index
from nldist.data.plan import Plan, balanced, divided, shuffled, sweep
from nldist.data.stream import Stream
from nldist.dist.world import World
from tests.data.make import decode_id, label_of, make_dataset
from tests.ranks import run_ranks

LAYOUTS = {
    "one shard": [131],
    "five uneven shards": [1, 90, 0, 7, 33],
    "forty small shards": [1, 2, 9, 0, 5] * 8,
    "fewer samples than ranks": [2],
}
THIRD = np.arange(0, 131, 3)
OTHERS = np.setdiff1d(np.arange(131), THIRD)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("layouts")
    return {name: make_dataset(directory / name, sizes) for name, sizes in LAYOUTS.items()}


def _plan(kind: str, n: int, world: World) -> Plan:
    if kind == "sweep":
        return sweep(n, rank=world.rank, size=world.size, batch_size=8)
    make = shuffled if kind == "shuffled" else partial(divided, labelled=THIRD, unlabelled=OTHERS)
    return make(n, rank=world.rank, size=world.size, batch_size=8, seed=0, epoch=1, window=20)


def _see(world: World, root: Path, kind: str, num_workers: int) -> tuple[np.ndarray, int]:
    """All ids that all ranks saw (of the role that is covered), after checking images, labels and steps."""
    index = Index.open(root, "train")
    plan = _plan(kind, len(index), world)
    seen, steps = [np.empty(0, np.int64)], 0
    for batches in Stream(index, None, plan, num_workers=num_workers):
        for role, batch in batches.items():
            ids = batch.ids.numpy()
            assert [decode_id(image.numpy()) for image in batch.images] == ids.tolist()
            assert np.array_equal(batch.labels.numpy(), label_of(ids))
            if role != "unlabelled":
                seen.append(ids)
        steps += 1
        # As in training: a rank with fewer steps than the others would leave them waiting here.
        world.barrier()
    return world.all_gather(np.concatenate(seen)), steps


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 3), (2, 0), (3, 1), (4, 0), (4, 3)])
def test_a_sweep_sees_every_sample_once(roots: dict[str, Path], layout: str, world_size: int, num_workers: int) -> None:
    n = sum(LAYOUTS[layout])
    answers = run_ranks(_see, world_size, roots[layout], "sweep", num_workers)
    assert len({steps for _, steps in answers}) == 1
    for ids, _ in answers:
        assert np.array_equal(ids, np.arange(n))  # owners hold contiguous ids in order, so rank order is id order


@pytest.mark.parametrize("kind", ["shuffled", "divided"])
@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 1), (3, 0), (4, 0)])
def test_training_plans_cover_their_samples_once(
    roots: dict[str, Path], kind: str, world_size: int, num_workers: int
) -> None:
    answers = run_ranks(_see, world_size, roots["five uneven shards"], kind, num_workers)
    wanted = np.arange(131) if kind == "shuffled" else THIRD
    assert len({steps for _, steps in answers}) == 1
    assert np.array_equal(np.sort(answers[0][0]), wanted)


def _balanced(_: World, root: Path) -> np.ndarray:
    index = Index.open(root, "train")
    return balanced(index.labels(), 50, seed=3, epoch=4, num_classes=index.num_classes)


def test_balanced_subset_is_the_same_on_every_rank_of_any_world(roots: dict[str, Path]) -> None:
    subsets = [ids for size in (1, 3) for ids in run_ranks(_balanced, size, roots["forty small shards"])]
    assert all(np.array_equal(ids, subsets[0]) for ids in subsets)
    assert len(subsets[0]) == 49
