"""dataset.json, and files that appear whole or not at all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nldist.errors import UserError
from nldist.files import replacing

FORMAT_VERSION = 1


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """`replacing`, for what a command of the user's writes.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with replacing(path) as aside:
            yield aside
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what is done stays, so run again") from None


def read_dataset(root: Path) -> dict[str, Any]:
    """The content of ROOT/dataset.json.

    Raises:
        UserError: there is none, or it is not a data set of this format version.
    """
    path = root / "dataset.json"
    try:
        dataset = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{root} is not a data set: it has no dataset.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(dataset, dict) or dataset.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is not a data set of format version {FORMAT_VERSION}")
    return dataset


def sharded_resize(root: Path, split: str) -> int | None:
    """The short side (pixels) to which sharding shrank a split's images; None: it did not, or it is not known."""
    try:
        plan = json.loads((root / split / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    resize: int | None = plan.get("resize")
    return resize


def known_classes(root: Path, split: str) -> list[str] | None:
    """The classes of the data set as its other splits have them, or None if it has no other split."""
    if not (root / "dataset.json").exists():
        return None
    dataset = read_dataset(root)
    return list(dataset["classes"]) if set(dataset["splits"]) - {split} else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with writing(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
