"""Per-sample state of methods: what tests of soft labels share."""

from pathlib import Path
from typing import Any

import numpy as np

from nldist.passes.method import Method


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row, in float64."""
    exponentials = np.exp(logits.astype(float) - logits.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def independent_of_the_batch(method: Method) -> None:
    """Let the passes train in eval mode: then a prediction is a function of the image alone."""
    engine: Any = method.engines[0]
    start = engine.start_pass

    def started(*arguments: int) -> None:
        start(*arguments)
        engine.model.eval()

    engine.start_pass = started


def assert_same_tables(one: Path, other: Path) -> None:
    """The newest checkpoints of two runs hold the same rows, bit for bit."""
    newest = [max(folder.glob("checkpoints/e*")) for folder in (one, other)]
    first, second = ({path.name: path for path in folder.rglob("*.npy")} for folder in newest)
    assert first.keys() == second.keys()
    assert any(name.startswith("soft.") for name in first)
    for name, path in first.items():
        np.testing.assert_array_equal(np.load(path), np.load(second[name]), err_msg=name)
