"""Write small data sets in the on-disk format, directly; each image carries its id in its pixels."""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Render = Callable[[int], np.ndarray]


def id_image(id_: int, height: int = 6, width: int = 8) -> np.ndarray:
    """An image (height, width, 3) of one colour that encodes `id_` in base 256."""
    colour = [id_ % 256, id_ // 256 % 256, id_ // 65536]
    return np.full((height, width, 3), colour, np.uint8)


def decode_id(image: np.ndarray) -> int:
    """The id that an image (3, h, w) encodes in its top left pixel."""
    red, green, blue = image[:, 0, 0].tolist()
    return int(red + 256 * green + 65536 * blue)


def label_of(ids: np.ndarray, num_classes: int = 7) -> np.ndarray:
    """The given label of each id."""
    return np.asarray(np.asarray(ids) * 31 % 101 % num_classes, np.int32)


def make_dataset(
    root: Path,
    shard_sizes: Sequence[int],
    *,
    split: str = "train",
    render: Render = id_image,
    image_format: str = "png",
    num_classes: int = 7,
    labels: np.ndarray | None = None,
    quality: int = 90,
) -> Path:
    """Write `sum(shard_sizes)` images as shards of these sizes, with their index; returns `root`."""
    directory = root / split
    directory.mkdir(parents=True)
    given = label_of(np.arange(sum(shard_sizes)), num_classes) if labels is None else labels
    rows: dict[str, list] = {name: [] for name in ("key", "shard", "offset", "size", "crc32", "height", "width")}
    shards = []
    for shard, count in enumerate(shard_sizes):
        path = directory / f"{split}-{shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for id_ in range(len(rows["key"]), len(rows["key"]) + count):
                pixels = render(id_)
                data = _encode(pixels, image_format, quality)
                key = f"part{shard}/image{id_:05d}"
                member = _add(tar, f"{key}.{image_format}", data)
                _add(tar, f"{key}.cls", str(int(given[id_])).encode())
                row = (key, shard, member, len(data), zlib.crc32(data), *pixels.shape[:2])
                for name, value in zip(rows, row, strict=True):
                    rows[name].append(value)
        facts = {"path": f"{split}/{path.name}", "num_samples": count, "num_bytes": path.stat().st_size}
        shards.append(facts | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    write_index(directory / "index.parquet", rows, given)
    write_facts(root, split, shards, num_classes)
    return root


def write_index(path: Path, columns: dict, labels: np.ndarray) -> None:
    """Write index.parquet, in several row groups."""
    ids = np.arange(len(labels), dtype=np.int64)
    types = {"offset": "i8", "size": "i8", "shard": "i4", "crc32": "u4", "height": "i4", "width": "i4"}
    arrays = {name: np.asarray(columns[name], dtype) for name, dtype in types.items()}
    table = pa.table({"id": ids, "key": columns["key"], "label": labels.astype(np.int32), **arrays})
    pq.write_table(table, path, row_group_size=100_000 if len(ids) > 100_000 else 16)


def write_facts(root: Path, split: str, shards: list[dict], num_classes: int) -> None:
    """Write dataset.json, or add a split to it."""
    path = root / "dataset.json"
    classes = [f"class {c}" for c in range(num_classes)]
    facts = {"format_version": 1, "name": "made", "classes": classes, "splits": {}}
    if path.exists():
        facts = json.loads(path.read_text())
    num_samples = sum(shard["num_samples"] for shard in shards)
    facts["splits"][split] = {"num_samples": num_samples, "shards": shards}  # type: ignore[index]
    path.write_text(json.dumps(facts))


def write_labels(root: Path, name: str, labels: np.ndarray, ids: np.ndarray | None = None) -> Path:
    """Write a label set of the train split."""
    path = root / "train" / "labels" / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    ids = np.arange(len(labels), dtype=np.int64) if ids is None else ids
    pq.write_table(pa.table({"id": ids, "label": labels.astype(np.int32)}), path)
    return path


def _encode(pixels: np.ndarray, image_format: str, quality: int) -> bytes:
    out = io.BytesIO()
    name = {"jpg": "JPEG"}.get(image_format, image_format)
    Image.fromarray(pixels).save(out, name, quality=quality)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member; returns where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset
