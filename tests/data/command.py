"""nldist's commands as users give them, and what is left on disk."""

import contextlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from nldist.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed; `error` is what a refusal says."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a refusal."""
        assert self.code == 2, (self.out, self.err)
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.endswith(lines[0] + "\n"), self.err
        return lines[0]


def nldist(*words: object) -> Done:
    """`nldist WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, words)))
    return Done(code, out.getvalue(), err.getvalue())


def shard(*words: object, split: str = "train") -> Done:
    """`nldist shard WORDS`, in one process."""
    return nldist("shard", *words, "--split", split, "--workers", 0)


def shard_well(*words: object, split: str = "train") -> str:
    """The same, which must go well; returns what it printed."""
    done = shard(*words, split=split)
    assert done.code == 0, done.err
    return done.out


def label_names(root: Path, split: str = "train") -> dict[str, str]:
    """The name of each sample's class, by key."""
    classes = json.loads((root / "dataset.json").read_text())["classes"]
    rows = pq.read_table(root / split / "index.parquet").to_pydict()
    return {key: classes[label] for key, label in zip(rows["key"], rows["label"], strict=True)}


def classes(root: Path) -> list[str]:
    """The class names in the order of their labels."""
    return list(json.loads((root / "dataset.json").read_text())["classes"])


def rejected(root: Path) -> dict[str, str]:
    """The reasons by the last part of the path, of all splits."""
    path = root / "rejected.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return {line["path"].rpartition(":")[2]: line["reason"] for line in lines}


def image_bytes(colour: int, kind: str = "PNG", **options: Any) -> bytes:
    """A small image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (colour, 0, 0)).save(buffer, kind, **options)
    return buffer.getvalue()


def write_image(path: Path, colour: int = 0) -> Path:
    """A small image file, with its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(colour))
    return path


def write_table(path: Path, labels: Iterable[object], header: str = "path,label") -> Path:
    """A table that gives image k beside it, which is written, the k-th label."""
    rows = []
    for number, label in enumerate(labels):
        write_image(path.parent / f"{number}.png", number)
        rows.append(f"{number}.png,{label}")
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def write_tar(path: Path, members: Iterable[tuple[str, bytes | tuple[bytes, str]]], **options: Any) -> Path:
    """A tar of members in this order: data, or a link of a type to a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path
