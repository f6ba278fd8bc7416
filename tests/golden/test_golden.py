"""The recorded losses by step (see __main__.py). A change that is not meant to change numbers shows it here."""

from pathlib import Path

import pytest

from tests.golden.runs import FOLDER, RUNS, SIZES, first_difference, read, run

# In float64, where other processors differ in the tenth digit; files have nine.
TOLERANCE = 1e-6


# What make soak alone runs: one rank, because two take every step that it takes, and reduce over both; and runs whose
# steps are those of others: forward begins as cross_entropy, and co_teaching_plus as co_teaching.
LIKE_OTHERS = ("cross_entropy", "co_teaching", "dividemix_real", "lend_paper", "mixnn")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=pytest.mark.slow if size == 1 or name in LIKE_OTHERS else ())
        for name in RUNS
        for size in SIZES
    ],
)
def test_losses_by_step_are_the_recorded_ones(name: str, size: int, digits: Path, tmp_path: Path) -> None:
    difference = first_difference(run(name, size, digits, tmp_path), read(FOLDER / f"{name}-{size}.json"), TOLERANCE)
    assert difference is None, difference


def test_a_comparison_names_the_first_step_that_differs() -> None:
    want = {"train epoch 1 net0/step_loss": [2.0, 1.5], "train epoch 1 accuracy (end)": [40.0]}
    assert first_difference(want, want, 0) is None
    assert first_difference(want | {"train epoch 1 net0/step_loss": [2.0, 1.51]}, want, 1e-2) is None
    for changed, told in (
        ([2.0, 1.52], "net0/step_loss, step 1: 1.52, not 1.5"),
        ([2.0, float("nan")], "net0/step_loss, step 1: nan, not 1.5"),
        ([2.0], "net0/step_loss: 1 steps, not 2"),
    ):
        assert str(first_difference(want | {"train epoch 1 net0/step_loss": changed}, want, 1e-2)).endswith(told)
    assert first_difference(want | {"more": [1.0]}, want, 1e-2) == "more: 1 steps, not 0"
