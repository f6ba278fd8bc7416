"""Members of a tar grouped into samples by their keys, wherever they stand in it.

WebDataset takes neighbours for a sample, ends a key at the first dot, and leaves out links. Here a sample has all
members of its key. It is refused, with the reason, where its image or label is not the only one.
"""

import json
import os
import posixpath
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from nldist.data.make.images import BadImageError, Limits, decoded_size
from nldist.data.make.keys import readable
from nldist.data.make.meaning import LabelError, json_label, shown
from nldist.data.make.sources.base import SYSTEM_FOLDERS, is_clutter
from nldist.data.make.tars import IMAGE_EXTENSIONS, DamagedTarError, Member, TarReader, split_name

Keys = Literal["webdataset", "filename"]

# WebDataset's own, and the directories of systems.
_LEFT_BEHIND = re.compile("^__[^/]*__($|/)|(^|/)(" + "|".join(map(re.escape, SYSTEM_FOLDERS)) + ")/")


@dataclass(frozen=True)
class Rules:
    """Which members are a sample's.

    The image is the member with the extension `image_key`; None: the only one with an image's extension. The label is
    in .cls, or in the entry `label_key` of .json, where dots lead into inner objects. With `keys` "filename" a key ends
    at a name's last dot, not at its first.
    """

    label_key: str | None = None
    image_key: str | None = None
    keys: Keys = "webdataset"
    limits: Limits = field(default_factory=Limits)


class Image(NamedTuple):
    """What the index says of an image."""

    offset: int
    size: int
    crc32: int
    height: int
    width: int


class Sample(NamedTuple):
    """One sample of a tar."""

    key: str
    image: Image
    label: str


class BadSample(NamedTuple):
    """Members of one key that are no sample, and why."""

    key: str
    reason: str


@dataclass
class _Part:
    """A member that may be a sample's image or label: what it holds, or why it cannot be used, or where it leads."""

    name: str
    image: Image | None = None
    label: str | None = None
    fault: str | None = None
    target: str | None = None


_Parts = dict[str, _Part]  # by extension


def samples(tar: TarReader, rules: Rules) -> Iterator[Sample | BadSample]:
    """The samples of a tar, in the order of their first members, once all of it has been read.

    Raises:
        DamagedTarError: as the reader; the samples before the damage have been given then.
    """
    found: dict[str, _Parts] = {}
    damage: DamagedTarError | None = None
    try:
        for member in tar:
            key, extension = split_name(member.name, rules.keys == "filename")
            if not extension or _is_passed_over(member.name):
                continue
            if key.endswith("/") or not key:
                yield from _without_key(member.name, extension, rules)
            else:
                _add(found.setdefault(key, {}), extension, member, rules)
    except DamagedTarError as error:
        damage = error
    names = _by_name(found)
    yield from (_sample(key, parts, names, rules) for key, parts in found.items())
    if damage is not None:
        raise damage


def _is_passed_over(name: str) -> bool:
    """Whether a member is WebDataset's own, or of what macOS and others leave behind."""
    return _LEFT_BEHIND.search(name) is not None or is_clutter(name.rpartition("/")[2], False)


def _without_key(name: str, extension: str, rules: Rules) -> Iterator[BadSample]:
    """What to say of a member whose name begins with a dot: nothing unless it is an image."""
    if extension == rules.image_key or _last(extension) in IMAGE_EXTENSIONS:
        yield BadSample(name, "its name begins with a dot, so it has no key")


def _add(parts: _Parts, extension: str, member: Member, rules: Rules) -> None:
    if extension in parts:
        both = [parts[extension].name, *({member.name} - {parts[extension].name})]
        parts[extension].fault = f"it has two members {' and '.join(both)}"
        return
    part = parts[extension] = _Part(member.name, target=member.target)
    if member.target is not None:
        return
    is_label = _last(extension) == _label_extension(rules)
    if not is_label and not _may_be_image(parts, extension, rules):
        part.fault = "its data were not looked at"
    elif member.is_sparse:
        part.fault = "it is stored as a sparse file, without its zeros: pack it without --sparse"
    elif member.size > rules.limits.max_bytes:
        part.fault = f"{member.size:,} bytes are more than the limit of {rules.limits.max_bytes:,}"
    elif is_label:
        _read_label(part, member.read(), rules.label_key)
    else:
        _read_image(part, member, rules.limits)


def _label_extension(rules: Rules) -> str:
    return "cls" if rules.label_key is None else "json"


def _last(extension: str) -> str:
    return extension.rpartition(".")[2]


def _may_be_image(parts: _Parts, extension: str, rules: Rules) -> bool:
    """Whether a member may turn out to be its sample's image: x.mask.png is not where there is x.jpg."""
    if rules.image_key is not None:
        return extension == rules.image_key
    if extension in IMAGE_EXTENSIONS:
        return True
    return _last(extension) in IMAGE_EXTENSIONS and parts.keys().isdisjoint(IMAGE_EXTENSIONS)


def _read_image(part: _Part, member: Member, limits: Limits) -> None:
    data = member.read()
    try:
        part.image = Image(member.offset, member.size, zlib.crc32(data), *decoded_size(data, limits))
    except BadImageError as error:
        part.fault = str(error)


def _read_label(part: _Part, data: bytes, label_key: str | None) -> None:
    try:
        if label_key is None:
            part.label = data.decode("utf-8-sig").strip()
        else:
            part.label = json_label(_entry(json.loads(data), label_key))
    except LabelError as error:
        part.fault = f"no usable label: {error}"
    except (ValueError, RecursionError):
        part.fault = f"no usable label: {data[:60]!r} is no {'text in UTF-8' if label_key is None else 'JSON'}"


def _entry(content: Any, label_key: str) -> Any:
    """The entry of this very name, else the one to which its dots lead. Raises LabelError if there is none."""
    if isinstance(content, dict) and label_key in content:
        return content[label_key]
    value = content
    for name in label_key.split("."):
        if not isinstance(value, dict) or name not in value:
            there = f"there are {shown(list(content))}" if isinstance(content, dict) else "the JSON is no object"
            raise LabelError(f"no entry {label_key!r}; {there}")
        value = value[name]
    return value


def _by_name(found: dict[str, _Parts]) -> dict[str, _Part]:
    """The parts that links may lead to; empty if there are no links."""
    parts = [part for group in found.values() for part in group.values()]
    if all(part.target is None for part in parts):
        return {}
    return {posixpath.normpath(part.name): part for part in parts}


def _sample(key: str, parts: _Parts, names: dict[str, _Part], rules: Rules) -> Sample | BadSample:
    try:
        key.encode()
    except UnicodeEncodeError:
        return BadSample(readable(os.fsencode(key)), "its name is not UTF-8")
    image = _chosen(parts, IMAGE_EXTENSIONS, "image", rules.image_key)
    if isinstance(image, str):
        return BadSample(key, image)
    label = _chosen(parts, (_label_extension(rules),), "label", None)
    if isinstance(label, str):
        return BadSample(key, label)
    image, label = (_followed(part, names) for part in (image, label))
    for part in (image, label):
        if part.fault is not None:
            return BadSample(key, part.fault)
    if image.image is None or label.label is None:
        return BadSample(
            key, f"its {'image' if image.image is None else 'label'} is damaged, or a link to what is none"
        )
    return Sample(key, image.image, label.label)


def _chosen(parts: _Parts, extensions: tuple[str, ...], what: str, wanted: str | None) -> _Part | str:
    """The one member that is the sample's image or label, or why there is none: x.jpg goes before x.input.jpg."""
    if wanted is not None:
        extensions = (wanted,)
    there = [name for name in extensions if name in parts]
    if not there and wanted is None:
        there = [name for name in parts if _last(name) in extensions]
    if len(there) == 1:
        return parts[there[0]]
    names = ", ".join(parts[name].name for name in there[:3]) + (", ..." if len(there) > 3 else "")
    if not there and what == "label" and "json" in parts:
        return "no label (looked for cls; there is json: --label-key ENTRY reads it)"
    if not there:
        return f"no {what} (looked for {', '.join(extensions)}; found {', '.join(sorted(parts)[:5])})"
    advice = "say which with --image-key EXTENSION" if what == "image" else "one is needed"
    if any("." in name for name in there):
        advice += ", or, as WebDataset ends a key at a name's first dot, take the whole file name with --keys filename"
    return f"{len(there)} {what}s under one key ({names}): {advice}"


def _followed(part: _Part, names: dict[str, _Part]) -> _Part:
    """What a link leads to."""
    for _ in range(len(names)):
        if part.target is None:
            return part
        if part.target not in names:
            return _Part(part.name, fault=f"{part.name} is a link to {part.target}, which this tar does not hold")
        part = names[part.target]
    return _Part(part.name, fault=f"{part.name} is a link to itself") if part.target is not None else part
