"""What a sweep sees, and what is made of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from nldist.config.file import load_config
from nldist.dist.world import World
from nldist.methods.cross_entropy import CrossEntropy
from nldist.passes.method import Verdicts
from nldist.passes.search import SearchSweep
from nldist.passes.sweep import ClosingSweep, FeatureSweep, LossSweep
from nldist.train.run_pass import run_pass
from tests.contexts import open_context, task_of
from tests.jobs import DIGITS
from tests.ranks import run_ranks

State = dict[str, Tensor]


def build(digits: Path, world: World | None = None) -> CrossEntropy:
    settings = [f"data.root={digits}", "method.name=cross_entropy", "train.epochs=4", "train.eval_batch_size=100"]
    return CrossEntropy(open_context(load_config(DIGITS, settings), world))


@pytest.fixture(scope="module")
def trained(digits: Path) -> State:
    method = build(digits)
    for epoch in range(4):
        run_pass(method.context, task_of(method, epoch, "net0"))
    state: State = method.engines[0].model.state_dict()
    return state


def judge(world: World, digits: Path, trained: State) -> tuple[list[np.ndarray], dict[str, float]]:
    method = build(digits, world)
    method.engines[0].model.load_state_dict(trained)
    task = ClosingSweep(method.context, method.logits, None)
    metrics = run_pass(method.context, task)
    columns = task.verdicts.clean_probability, task.verdicts.suggested, task.margins
    return list(map(world.all_gather, columns)), metrics


def test_a_method_without_an_opinion_is_judged_by_its_losses_on_any_number_of_ranks(
    digits: Path, trained: State
) -> None:
    """Losses and classes against one plain forward of all images (our own reference)."""
    method = build(digits)
    method.engines[0].model.load_state_dict(trained)
    context = method.context
    batches = [step["all"] for step in context.stream("train", context.sweep(1437))]
    views = [[context.fixed_view(batch) for batch in batches]]
    views += [[context.view(batch, number, "verdicts") for batch in batches] for number in range(4)]
    every = torch.stack([torch.cat([method.logits(images) for images in view]) for view in views])
    labels = torch.from_numpy(context.labels).long()
    losses = np.mean([F.cross_entropy(logits, labels, reduction="none").numpy() for logits in every], axis=0)
    logits = every.mean(0)
    assert len({tuple(row) for row in every[:, 0].tolist()}) == 5, "views differ"
    assert context.clean is not None
    correct = context.clean == context.labels
    others = [np.delete(row, label).max() for row, label in zip(logits.numpy(), context.labels, strict=True)]
    expected = logits.numpy()[np.arange(len(losses)), context.labels] - others
    for size in (1, 2, 3):
        for rank, ((clean, suggested, margins), metrics) in enumerate(run_ranks(judge, size, digits, trained)):
            np.testing.assert_allclose(margins, expected, rtol=1e-4, atol=1e-4)
            assert (suggested == logits.argmax(1).numpy()).mean() > 0.998
            order = np.argsort(losses)
            assert clean[order[:300]].min() > clean[order[-300:]].max(), "the smaller the loss, the cleaner"
            if rank == 0:
                assert metrics["split_auc"] == pytest.approx(roc_auc_score(correct, clean), abs=1e-6)
                assert metrics["split_auc"] > 0.75


def test_a_method_s_own_opinion_stands(digits: Path, trained: State) -> None:
    method = build(digits)
    method.engines[0].model.load_state_dict(trained)
    own = Verdicts(np.linspace(0, 1, 1437), np.arange(1437) % 10)
    task = ClosingSweep(method.context, method.logits, own)
    assert run_pass(method.context, task) == {}
    assert task.verdicts is own
    assert np.isfinite(task.margins).all()


def features_of(world: World, digits: Path) -> np.ndarray:
    context = build(digits, world).context
    column = context.table.add("pixels", torch.float32, (64,))
    run_pass(context, FeatureSweep(context, lambda images: images[:, 0].flatten(1), column))
    return column.gather()


def test_every_sample_s_features_stay_with_their_owner(digits: Path) -> None:
    alone = features_of(World.single(), digits)
    assert len(np.unique(alone, axis=0)) > 1400
    for size in (2, 3):
        for gathered in run_ranks(features_of, size, digits):
            np.testing.assert_array_equal(gathered, alone)


def losses_of_other_labels(world: World, digits: Path, trained: State) -> tuple[np.ndarray, np.ndarray]:
    method = build(digits, world)
    method.engines[0].model.load_state_dict(trained)
    LossSweep.add_columns(method.context, "")
    sweep = LossSweep(method.context, {"": method.logits}, lambda _: {}, labels=lambda ids: ids % 10)
    run_pass(method.context, sweep)
    return world.all_gather(sweep.losses[""]), method.context.table["suggested"].gather()


def test_a_sweep_may_take_the_losses_of_other_labels_than_the_given_ones(digits: Path, trained: State) -> None:
    method = build(digits)
    method.engines[0].model.load_state_dict(trained)
    context = method.context
    batches = [step["all"] for step in context.stream("train", context.sweep(1437))]
    logits = torch.cat([method.logits(context.fixed_view(batch)) for batch in batches]).numpy().astype(float)
    others = np.arange(1437) % 10
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(1437), others]
    for size in (1, 2, 3):
        for losses, suggested in run_ranks(losses_of_other_labels, size, digits, trained):
            np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
            assert (suggested == logits.argmax(1)).mean() > 0.998


def test_a_checkpoint_within_a_sweep_has_what_was_seen_and_the_rest_comes_after_it(digits: Path) -> None:
    method = build(digits)
    LossSweep.add_columns(method.context, "")
    context, table = method.context, method.context.table
    plan = context.sweep(1437)
    whole = LossSweep(context, {"": method.logits}, lambda _: {})
    run_pass(context, whole)
    expected = whole.losses[""].copy()

    parts = [LossSweep(context, {"": method.logits}, lambda _: {}) for _ in range(2)]
    for part, steps in zip(parts, (range(5), range(5, plan.num_steps)), strict=True):
        part.start(plan.num_steps, steps.start)
        for step, batches in zip(steps, context.stream("train", plan, steps.start), strict=False):
            part.step(batches, step)
        part.sync()
        seen = 1437 if steps.start else 500
        np.testing.assert_array_equal(table["loss"].numpy()[:seen], expected[:seen])
        assert np.isnan(table["loss"].numpy()[seen:]).all()


def searched(world: World, digits: Path) -> np.ndarray:
    """Of images that the first rank of three owns."""
    context = build(digits, world).context
    column = context.table.add("near", torch.int32, (3,), fill=-1)
    few = np.arange(0, 400, 2)
    run_pass(context, SearchSweep(context, lambda images: images[:, 0].flatten(1), column, few))
    return column.gather()


def test_a_rank_without_an_image_takes_part_in_the_search(digits: Path) -> None:
    alone = searched(World.single(), digits)
    assert (alone[np.arange(0, 400, 2)] >= 0).all()
    for gathered in run_ranks(searched, 3, digits):
        np.testing.assert_array_equal(gathered, alone)
