"""dataset.json, and files that appear whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nldist.errors import UserError

FORMAT_VERSION = 1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and rename it to `path` when all went well."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what is done stays, so run again") from None
    finally:
        aside.unlink(missing_ok=True)


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


def known_classes(root: Path, split: str) -> list[str] | None:
    """The classes of the data set as its other splits have them, or None if it has no other split."""
    if not (root / "dataset.json").exists():
        return None
    dataset = read_dataset(root)
    return list(dataset["classes"]) if set(dataset["splits"]) - {split} else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
