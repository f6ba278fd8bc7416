"""How the images of a run are shrunk before it sees them."""

import json
from pathlib import Path

import pytest

from nldist.config.file import load_config
from nldist.run.classifier import resize_of
from tests.jobs import DIGITS


@pytest.mark.parametrize(("saved", "resize"), [({"resize": None}, None), ({"resize": 32}, 32), ({}, 64)])
def test_what_the_weights_say_goes_before_the_data_set(saved: dict, resize: int | None, tmp_path: Path) -> None:
    """Only weights of an nldist that did not say it leave it to the data set, which may be another one by now."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "plan.json").write_text(json.dumps({"resize": 64}))
    assert resize_of(saved, load_config(DIGITS, [f"data.root={tmp_path}"])) == resize
