from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nldist.data.stream import Batch, Stream
from nldist.dist.world import World
from nldist.methods.co_teaching import selected_means, small_losses
from tests.contexts import task_of
from tests.methods.baselines import PLAIN, assert_descended, build, one_step
from tests.ranks import run_ranks

HALF = ("method.co_teaching.forget_rate=0.5", "method.co_teaching.gradual_epochs=4")


def test_the_share_that_is_kept_falls_as_in_the_paper(digits: Path) -> None:
    """R(T) = 1 - tau min(T^c / T_k, 1), after T epochs."""
    method = build(digits, "co_teaching", *HALF)
    assert [method.keep_rate(epoch) for epoch in range(6)] == [1, 0.875, 0.75, 0.625, 0.5, 0.5]
    method = build(digits, "co_teaching", *HALF, "method.co_teaching.exponent=2")
    assert [method.keep_rate(epoch) for epoch in range(4)] == [1, 0.875, 0.5, 0.5]


def test_small_losses_against_a_plain_sort() -> None:
    rng = np.random.default_rng(0)
    for n, rate in ((1, 0.5), (7, 0.5), (10, 0.9), (10, 1.0), (128, 0.3), (3, 0.1)):
        losses, among = rng.random(n).astype(np.float32), rng.random(n) < 0.7
        candidates = np.flatnonzero(among)
        kept = int(rate * len(candidates)) or len(candidates)
        expected = np.zeros(n, bool)
        expected[candidates[np.argsort(losses[candidates])][:kept]] = True
        found = small_losses(torch.from_numpy(losses), rate, torch.from_numpy(among))
        np.testing.assert_array_equal(found.numpy(), expected)
    assert not small_losses(torch.ones(4), 0.5, torch.zeros(4, dtype=torch.bool)).any(), "no candidate, no selection"
    assert small_losses(torch.ones(4), 0.5, torch.ones(4, dtype=torch.bool)).sum() == 2, "also of equal losses"


def selection(losses: list[Tensor], keep: float, among: Tensor) -> list[Tensor]:
    """Of each network, what the other one selected (our own reference): places in the batch."""
    places = torch.arange(len(among))[among]
    chosen = [places[each[among].argsort()[: int(keep * len(places))]] for each in losses]
    return chosen[::-1]


@pytest.mark.parametrize(("name", "epoch", "keep"), [("co_teaching", 2, 0.75), ("co_teaching_plus", 6, 0.5)])
def test_each_network_learns_from_what_the_other_selects(name: str, epoch: int, keep: float, digits: Path) -> None:
    method = build(digits, name, *HALF, "method.co_teaching_plus.warmup_epochs=6", *PLAIN)
    done = one_step(method, task_of(method, epoch, "joint"))
    logits = [model.logits(done.images) for model in done.models]
    losses = [F.cross_entropy(each, done.labels, reduction="none") for each in logits]
    among = logits[0].argmax(1) != logits[1].argmax(1) if name == "co_teaching_plus" else torch.ones(32).bool()
    chosen = selection(losses, keep, among[: len(done.ids)])
    assert not torch.equal(chosen[0].sort().values, chosen[1].sort().values)
    for number in (0, 1):
        loss = losses[number][chosen[number]].mean()
        torch.testing.assert_close(done.values[f"loss{number}"], loss.detach())
        assert_descended(done.models[number], method.engines[number].model, loss, 0.02)


def test_during_the_warm_up_all_samples_are_candidates(digits: Path) -> None:
    method = build(digits, "co_teaching_plus", "method.co_teaching_plus.warmup_epochs=2")
    same = [torch.eye(10), torch.eye(10)]
    assert method.candidates(same, 1).all()
    assert not method.candidates(same, 2).any()


def means_of(world: World, losses: list[list[float]], masks: list[list[bool]]) -> tuple[float, list[float]]:
    """This rank's share of the mean of the first network's losses, and its gradient."""
    values = torch.tensor(losses[world.rank], requires_grad=True)
    share, _ = selected_means([values, values.detach()], [torch.tensor(masks[world.rank])] * 2, world)
    (gradient,) = torch.autograd.grad(share, values)
    return float(share.detach()), gradient.tolist()


def test_the_mean_is_over_all_ranks_selections_and_a_rank_may_have_none() -> None:
    losses = [[1.0, 2.0, 3.0], [4.0, 8.0]]
    results = run_ranks(means_of, 2, losses, [[True, False, True], [True, False]])
    assert sum(share for share, _ in results) / 2 == pytest.approx((1 + 3 + 4) / 3)
    assert [gradient for _, gradient in results] == [pytest.approx([2 / 3, 0, 2 / 3]), pytest.approx([2 / 3, 0])]
    results = run_ranks(means_of, 2, losses, [[False] * 3, [True, True]])
    assert [share for share, _ in results] == [0, pytest.approx(12)]
    for share, gradient in run_ranks(means_of, 2, losses, [[False] * 3, [False] * 2]):
        assert (share, set(gradient)) == (0, {0.0})


def stepped(world: World, digits: Path, counts: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Both networks after one step in which each rank has so many of the same rows."""
    settings = ("method.co_teaching.forget_rate=0", "optim.weight_decay=0", "optim.lr_rule=none")
    method = build(digits, "co_teaching_plus", *settings, "method.co_teaching_plus.warmup_epochs=0", world=world)
    for engine in method.engines:  # batch norm of averages, so that rows do not depend on their batch
        engine.model.eval()
        engine.model.train = lambda mode=True, model=engine.model: model
    task: Any = task_of(method, 3, "joint")
    single = build(digits, "co_teaching").context
    whole = next(iter(Stream(single.train, single.labels, single.shuffled(3, "joint", 32))))["all"]
    start = sum(counts[: world.rank])
    rows = slice(start, start + counts[world.rank])
    task.start(10, 0)
    task.step({"all": Batch(*(value[rows] for value in vars(whole).values()))}, 0)
    return [{name: p.clone() for name, p in engine.model.state_dict().items()} for engine in method.engines]


def test_a_step_is_that_of_all_disagreements_together(digits: Path) -> None:
    """With nothing forgotten the selection is the disagreement, whatever the ranks' batches are."""
    ((first, second),) = run_ranks(stepped, 1, digits, (30,))
    for counts in ((20, 10), (29, 1)):
        for networks in run_ranks(stepped, 2, digits, counts):
            for found, expected in zip(networks, (first, second), strict=True):
                for name, value in expected.items():
                    torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
