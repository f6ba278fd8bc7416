"""Verdicts from a row of class probabilities of every sample."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

import nldist.dist.table as table_module
from nldist.dist.table import Column, SampleTable
from nldist.dist.world import World
from nldist.passes.context import Context
from nldist.passes.soft import soft_labels, soft_verdicts
from tests.memory import peak_growth


def context_of(labels: np.ndarray) -> Context:
    """What is asked of it: the labels, all of which this rank owns."""
    table = SimpleNamespace(owned=range(len(labels)))
    return cast(Context, SimpleNamespace(labels=labels, table=table))


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_they_are_the_given_class_s_share_and_the_largest_class(
    block_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "_BLOCK_BYTES", block_bytes)
    random = np.random.default_rng(0)
    rows, labels = torch.from_numpy(random.random((50, 7))).to(dtype), random.integers(0, 7, 50)
    rows[[3, 20]] = 0
    seen = torch.ones(50, dtype=torch.bool)
    seen[[4, 49]] = False
    verdicts = soft_verdicts(context_of(labels), rows, seen)
    exact = rows.double().numpy()
    with np.errstate(invalid="ignore"):
        expected = exact[np.arange(50), labels] / exact.sum(1)
    unknown = [3, 4, 20, 49]
    expected[unknown] = np.nan
    np.testing.assert_allclose(verdicts.clean_probability, expected, rtol=1e-6)
    suggested = exact.argmax(1)
    suggested[unknown] = -1
    assert verdicts.suggested.tolist() == suggested.tolist()


def test_logits_are_read_as_probabilities() -> None:
    random = np.random.default_rng(0)
    rows, labels = torch.from_numpy(random.normal(size=(50, 7))).float(), random.integers(0, 7, 50)
    verdicts = soft_verdicts(context_of(labels), rows, read=lambda part: part.softmax(1))
    np.testing.assert_allclose(verdicts.clean_probability, rows.softmax(1)[range(50), labels], rtol=1e-6)


def test_labels_begin_without_a_copy_of_all_rows() -> None:
    labels = np.random.default_rng(0).integers(0, 1_000, 100_000)
    facts = {"train": SimpleNamespace(num_classes=1_000), "table": SampleTable(len(labels), World.single())}
    config = SimpleNamespace(method=SimpleNamespace(soft_dtype="float16"))
    context = cast(Context, SimpleNamespace(labels=labels, config=config, **facts))
    columns: list[Column] = []
    growth = peak_growth(lambda: columns.append(soft_labels(context, "soft", 10)))
    rows = columns[0].rows
    assert growth < 1.5 * rows.nbytes
    assert rows[range(len(labels)), labels].eq(10).all()
    assert rows.count_nonzero() == len(labels)


def test_they_need_no_copy_of_all_rows() -> None:
    rows = torch.ones(100_000, 1_000, dtype=torch.float16)
    context = context_of(np.zeros(len(rows), np.int32))
    assert peak_growth(lambda: soft_verdicts(context, rows)) < rows.nbytes / 2
    assert peak_growth(lambda: soft_verdicts(context, rows, read=lambda part: part.float().softmax(1))) < rows.nbytes
