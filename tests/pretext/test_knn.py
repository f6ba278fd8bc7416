from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from nldist.dist.world import World
from nldist.passes.context import Context
from nldist.pretext.knn import knn_passes, vote
from nldist.train.run_pass import run_pass
from tests.pretext.make import context_of
from tests.ranks import run_ranks


def pixels(images: Tensor) -> Tensor:
    """Features that are exact, so that nothing depends on the batch: one channel's pixels."""
    return images[:, 0].flatten(1)


def measure(world: World, digits: Path, *overrides: str) -> dict[str, Any]:
    context = context_of(digits, "simclr", *overrides, world=world)
    assert context.config.pretext is not None
    bank, query = knn_passes(context, pixels, context.config.pretext)
    run_pass(context, bank)
    return run_pass(context, query)


def everything(context: Context, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All features of a split, and all its labels."""
    index = context.train if split == "train" else context.evaluation
    steps = [step["all"] for step in context.stream(split, context.sweep(len(index)))]
    features = torch.cat([pixels(context.fixed_view(batch)) for batch in steps])
    return features.numpy(), torch.cat([batch.labels for batch in steps]).numpy()


@pytest.mark.parametrize(("k", "num_samples"), [(20, "null"), (5, "300"), (20, "7")])
def test_accuracy_is_scikit_learn_s_on_any_number_of_ranks(k: int, num_samples: str, digits: Path) -> None:
    overrides = (f"pretext.knn_k={k}", f"pretext.knn_samples={num_samples}", "train.eval_batch_size=100")
    context = context_of(digits, "simclr", *overrides)
    bank = knn_passes(context, pixels, context.config.pretext)[0]  # type: ignore[arg-type]
    plan = bank.plan()
    ids = np.concatenate([plan.step(step)["all"].ids for step in range(plan.num_steps)])
    assert len(ids) == (1437 if num_samples == "null" else int(num_samples))
    train, test = everything(context, "train"), everything(context, "evaluation")
    expected = {}
    for name, labels in (("knn_accuracy", context.labels), ("knn_accuracy_clean", context.clean)):
        assert labels is not None
        reference = KNeighborsClassifier(min(k, len(ids)), weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine")
        expected[name] = 100 * reference.fit(train[0][ids], labels[ids]).score(*test)
    if len(ids) > 20:
        assert expected["knn_accuracy_clean"] > 80
        assert expected["knn_accuracy_clean"] > expected["knn_accuracy"]
    for size in (1, 2, 3):
        for result in run_ranks(measure, size, digits, *overrides):
            assert result == pytest.approx(expected, abs=1e-9)


def test_votes_weigh_by_similarity_and_absent_neighbours_have_none() -> None:
    scores = np.array([[0.9, 0.5, 0.5], [0.5, 0.5, 0.5], [0.3, -np.inf, -np.inf]])
    labels = np.array([[0, 2, 2], [0, 2, 2], [1, 3, 3]])
    assert vote(scores, labels, 4).tolist() == [0, 2, 1]
