"""The audit's page: one HTML file that is opened from the disk, with everything in it."""

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import trange

from nldist.data.reader import Reader
from nldist.files import replacing
from nldist.report.audit import Audit, Pair
from nldist.report.duplicates import Duplicates

SIDE = 128  # pixels of a thumbnail's longer side, at most
_QUALITY = 80  # of its JPEG
_MAX_MATRIX = 30  # classes that a whole confusion table is drawn for
_MAX_PAIRS = 100  # in the list
_NUM_EACH = 5  # images of each pair in the list, at least
_MAX_GROUPS = 100  # of duplicates
_MAX_MEMBERS = 6  # of a group
_MAX_NAMED = 500  # files that could not be read
_BLOCK = 64


def thumbnails(reader: Reader, ids: np.ndarray) -> dict[int, str]:
    """JPEG files in base64 of those of the images that can be read; a bar tells of the progress."""
    found = {}
    for start in trange(0, len(ids), _BLOCK, desc="thumbnails", unit=f" x {_BLOCK}", leave=False):
        block = ids[start : start + _BLOCK]
        images = reader.read(block)
        for place, pixels, (height, width) in zip(images.kept, images.pixels, images.sizes, strict=True):
            file = io.BytesIO()
            Image.fromarray(pixels[:height, :width].numpy()).save(file, "JPEG", quality=_QUALITY)
            found[int(block[place])] = base64.b64encode(file.getvalue()).decode()
    return found


def write_page(
    path: Path,
    audit: Audit,
    reader: Reader,
    facts: Mapping[str, Any],
    duplicates: Sequence[Duplicates],
    refused: Sequence[Mapping[str, str]],
    num_images: int,
) -> int:
    """Write the page with at most `num_images` thumbnails in its gallery; returns its size in bytes.

    Args:
        path: of the page.
        audit: what it tells.
        reader: of the images; its `max_side` is the thumbnails'.
        facts: about the run, shown as they are.
        duplicates: groups with different labels, the most doubtful first.
        refused: path and reason of images that the data set was made without.
        num_images: in the gallery.
    """
    index, pairs = audit.index, audit.pairs()
    ids = audit.chosen(pairs[:_MAX_PAIRS], num_images, _NUM_EACH)
    groups = [(group, group.ids[:_MAX_MEMBERS]) for group in duplicates[:_MAX_GROUPS]]
    pictured = np.unique(np.concatenate([ids, *(np.array(members) for _, members in groups)]).astype(np.int64))
    keys = dict(zip(pictured.tolist(), index.keys(pictured), strict=True))
    data = {
        "run": _digest(facts),
        "classes": index.classes,
        "pictures": thumbnails(reader, pictured),
        "items": [_item(audit, id_, keys[id_]) for id_ in ids.tolist()],
        "groups": [
            {"exact": group.exact, "count": len(group.ids), "items": [_item(audit, id_, keys[id_]) for id_ in members]}
            for group, members in groups
        ],
    }
    unread = audit.unseen[:_MAX_NAMED]
    text = _render(
        data=data,
        facts=facts,
        classes=index.classes,
        total=audit.total(),
        by_class=sorted(enumerate(audit.by_class()), key=lambda row: -row[1].expected),
        pairs=pairs[:_MAX_PAIRS],
        num_pairs=len(pairs),
        matrix=_matrix(pairs, index.num_classes),
        drawn=_pairs_of(audit, ids),
        num_wrong=int(audit.wrong.sum()),
        ended=audit.samples.ended,
        num_groups=len(duplicates),
        unread=index.keys(unread),
        num_unread=len(audit.unseen),
        refused=refused[:_MAX_NAMED],
        num_refused=len(refused),
    )
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return len(text.encode())


def _pairs_of(audit: Audit, ids: np.ndarray) -> set[tuple[int, int]]:
    """Given and suggested class of those of the samples whose labels are probably wrong."""
    wrong = ids[audit.wrong[ids]]
    return set(zip(audit.samples.given[wrong].tolist(), audit.samples.suggested[wrong].tolist(), strict=True))


def _item(audit: Audit, id_: int, key: str) -> dict[str, Any]:
    """A sample as the page's script knows it."""
    samples = audit.samples
    seen = audit.rank[id_] <= len(audit.order)
    return {
        "id": id_,
        "key": key,
        "given": int(samples.given[id_]),
        "suggested": int(samples.suggested[id_]),
        "p": round(float(samples.clean_probability[id_]), 6) if seen else None,
        "rank": int(audit.rank[id_]) if seen else None,
    }


def _matrix(pairs: Sequence[Pair], num_classes: int) -> list[list[int]] | None:
    """Counts by given and suggested class; None where there are too many to be read."""
    if num_classes > _MAX_MATRIX:
        return None
    counts = np.zeros((num_classes, num_classes), np.int64)
    for pair in pairs:
        counts[pair.given, pair.suggested] = pair.count
    table: list[list[int]] = counts.tolist()
    return table


def _digest(facts: Mapping[str, Any]) -> str:
    """What a browser keeps a person's marks under: the run and its labels."""
    return hashlib.sha256(json.dumps([facts["run"], facts["labels"]]).encode()).hexdigest()[:16]


def _render(**values: Any) -> str:
    """The page. No script but its own may run, and nothing is fetched: the policy in its head says so."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("nldist.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,.0f}"
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    script, style = (loader.get_source(environment, name)[0] for name in ("audit.js", "audit.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page: str = environment.get_template("audit.html").render(script=script, style=style, digest=digest, **values)
    return page
