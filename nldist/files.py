"""Files that are never half there."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text)
    os.replace(aside, path)
