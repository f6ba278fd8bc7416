"""What names of images stand for."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from nldist.data.find import Found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("1.jpg", "notes.txt", "b/2.jpg", "b/c/3.PNG", "d/4.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ([""], ["1.jpg", "b/2.jpg", "b/c/3.PNG", "d/4.jpg"]),
        (["**"], ["1.jpg", "b/2.jpg", "b/c/3.PNG", "d/4.jpg"]),
        (["**/*"], ["1.jpg", "b/2.jpg", "b/c/3.PNG", "d/4.jpg"]),
        (["*"], ["1.jpg"]),
        (["[bd]"], ["b/2.jpg", "b/c/3.PNG", "d/4.jpg"]),
        (["b/*"], ["b/2.jpg"]),
        (["notes.txt", "1.jpg"], ["notes.txt", "1.jpg"]),
    ],
)
def test_each_image_comes_once(names: Sequence[str], wanted: Sequence[str], tree: Path) -> None:
    """A file that is named itself counts whatever its extension; a pattern's directories only where it has no files."""
    found = [os.fsdecode(place.path) for place in Found([str(tree / name) for name in names])]
    assert found == [str(tree / name) for name in wanted]
