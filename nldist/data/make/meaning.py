"""What a label means: one rule for tables, .cls, .json, folders and label sets.

A label is text, stripped of blanks. A known class name wins; then a whole number (3 or 3.0) is a class index. Where it
could be the name of one class and the index of another it is refused until the user says which. Where no classes are
known, whole numbers are indices, and all other words are the classes' names. No other number, boolean or nan has a
meaning unless a known class bears that name.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from nldist.errors import UserError

Reading = Literal["names", "indices"]
READINGS: tuple[Reading, ...] = get_args(Reading)
MAX_CLASSES = 1_000_000
SHOWN = 5

_INDEX = re.compile(r"\+?0*([0-9]{1,9})(\.0*)?")  # longer ones are article numbers and the like: names
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NO_LABELS = {"true", "false", "nan", "inf", "infinity"}


class LabelError(Exception):
    """A value that is no label at all; the message says why."""


@dataclass(frozen=True)
class Meaning:
    """The classes, the class of each label, and why the others have none."""

    classes: list[str]
    class_of: dict[str, int] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def meaning(place: str, labels: Iterable[str], classes: Sequence[str] | None, reading: Reading | None) -> Meaning:
    """Give each of the distinct `labels` of `place` its class.

    Args:
        place: where they were found, for messages.
        labels: as they were written.
        classes: the names of the known classes, in order; None: the labels define them.
        reading: whether numbers are names or indices of classes; None: what they can only be.

    Raises:
        UserError: a label has two meanings.
    """
    texts = list(dict.fromkeys(labels))
    if classes is None:
        return _defined(place, texts, reading)
    by_name = names_of(classes)
    if reading is None:
        _check_numbers(place, texts, classes, by_name)
    result = Meaning(list(classes))
    for text in texts:
        name, number = by_name(text), _index(text)
        index = number if number is not None and number < len(classes) else None
        found = {"names": name, "indices": index, None: index if name is None else name}[reading]
        if found is None:
            result.faults[text] = _fault(text, classes, reading)
        else:
            result.class_of[text] = found
    return result


def could_be(text: str, label: int, by_name: Callable[[str], int | None]) -> bool:
    """Whether a label could mean this class, by its name (`names_of`) or its index."""
    return label in (by_name(text), _index(text))


def names_of(classes: Sequence[str]) -> Callable[[str], int | None]:
    """Look a label up among names: as it is, else in its Unicode normal form, else as the whole number that it is."""
    exact: dict[Any, int] = {name: index for index, name in enumerate(classes)}
    forms = _unique((_form(name), index) for index, name in enumerate(classes))
    numbers = _unique((_index(name), index) for index, name in enumerate(classes))

    def find(text: str) -> int | None:
        for table, key in ((exact, text), (forms, _form(text)), (numbers, _index(text))):
            if key is not None and key in table:
                return table[key]
        return None

    return find


def in_order(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: as numbers if all of them are numbers, else as text."""
    texts = sorted(names)
    return sorted(texts, key=float) if all(map(_NUMBER.fullmatch, texts)) else texts


def json_label(value: Any) -> str:
    """The text of a label in JSON. Raises LabelError for what is no text, number or boolean."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, list | dict):
        raise LabelError(f"{json.dumps(value):.60} is no label")
    return json.dumps(value)


def _check_numbers(place: str, texts: list[str], classes: Sequence[str], by_name: Callable[[str], int | None]) -> None:
    """Raise UserError if a number could be one class by name and another by index, or not all can be the same."""
    only_names, only_indices = [], []
    for text in texts:
        name, index = by_name(text), _index(text)
        if index is None:
            continue
        if name is None and index < len(classes):
            only_indices.append(text)
        elif name is not None and index >= len(classes):
            only_names.append(text)
        elif name is not None and name != index:
            raise UserError(_two_meanings(place, text, classes[name], classes[index]))
    if only_names and only_indices:
        raise UserError(
            f"{place}: the label {only_names[0]!r} can only be the name of a class, and {only_indices[0]!r} only an "
            "index: say which with --labels names or --labels indices"
        )


def _defined(place: str, texts: list[str], reading: Reading | None) -> Meaning:
    """The labels of a source that defines the classes."""
    faults = {text: why for text in texts if (why := _no_name(text))}
    numbers = {text: number for text in texts if (number := _index(text)) is not None}
    words = [text for text in texts if text not in faults and text not in numbers]
    if reading == "indices" or (reading is None and numbers):
        faults |= {text: _no_index(text) for text in words}
        largest = max(numbers.values(), default=-1)
        if largest >= MAX_CLASSES:
            raise UserError(
                f"{place}: the label {largest} is too large for a class index: if labels are names, give --labels names"
            )
        return Meaning([str(index) for index in range(largest + 1)], numbers, faults)
    names: dict[str, str] = {}
    for text in sorted(text for text in texts if text not in faults):
        names.setdefault(_form(text), text.strip() if _index(text) is None else _form(text))
    classes = in_order(names.values())
    index_of = {name: index for index, name in enumerate(classes)}
    return Meaning(classes, {text: index_of[names[_form(text)]] for text in texts if text not in faults}, faults)


def _index(text: str) -> int | None:
    """The whole number, from 0, that a label is."""
    found = _INDEX.fullmatch(text.strip())
    return int(found[1]) if found else None


def _form(text: str) -> str:
    """A form that two spellings of one name share."""
    text = unicodedata.normalize("NFC", text.strip())
    return text.partition(".")[0].removeprefix("+") if _INDEX.fullmatch(text) else text


def _unique(pairs: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    """The keys that only one class has."""
    listed = list(pairs)
    count = Counter(key for key, _ in listed)
    return {key: index for key, index in listed if count[key] == 1}


def _no_name(text: str) -> str | None:
    """Why a label cannot be the name of a class that nobody has listed."""
    plain = text.strip()
    if not plain:
        return "the label is empty"
    if plain.casefold().lstrip("+-") in _NO_LABELS or (_index(text) is None and _is_odd_number(plain)):
        what = "is out of range: class indices start from 0" if re.fullmatch("-[0-9]+", plain) else "is no class index"
        return f"the label {plain} {what}; if it is a class's name, list the names in --classes FILE"
    return None


def _is_odd_number(plain: str) -> bool:
    return _NUMBER.fullmatch(plain) is not None and not re.fullmatch("[0-9]{10,}", plain)


def _no_index(text: str) -> str:
    return (
        f"the label {text.strip()!r} is no class index, unlike others: if all labels are names, give --labels names"
        " or --classes FILE"
    )


def _fault(text: str, classes: Sequence[str], reading: Reading | None) -> str:
    """Why a label is none of the known classes."""
    number, plain = _index(text), text.strip()
    if not plain:
        return "the label is empty"
    if number is not None and reading != "names":
        return f"the label {plain} is out of range: there are {len(classes)} classes, so 0 to {len(classes) - 1}"
    if number is None and (why := _no_name(text)):
        return f"{why.partition(';')[0]}; the classes are {shown(classes)}"
    if reading == "indices":
        return f"the label {plain!r} is no class index"
    return f"the label {plain!r} is not among the {len(classes)} classes {shown(classes)}"


def _two_meanings(place: str, text: str, name: str, other: str) -> str:
    return (
        f"{place}: the label {text.strip()!r} could be the class that is named {name!r}, or the one with this index, "
        f"which is {other!r}: say which with --labels names or --labels indices"
    )


def shown(names: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
