"""Marks on settings, beside their types: which ones decide about what is learnt, and which came later.

    num_workers: Annotated[int, FREE] = 2

Marks are all that says so: what a run may change between its starts, and what names a stage, follows from them.
"""

from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from pydantic import BaseModel


class Mark(Enum):
    """A property of a setting."""

    FREE = "free"
    LATER = "later"


# It changes nothing that is learnt: it may change between the starts of one run, and names no stage.
FREE = Mark.FREE
# Stages have been made before it came. It names them only where it has not its default, so that those are found.
LATER = Mark.LATER


def flat(config: BaseModel) -> dict[str, Any]:
    """All settings by dotted name, as plain values."""
    return {setting.name: setting.value for setting in _settings(config)}


def free_sections(model: type[BaseModel]) -> set[str]:
    """The sections of a configuration in which nothing decides."""
    return {name for name, field in model.model_fields.items() if FREE in field.metadata}


def deciding(config: BaseModel) -> dict[str, Any]:
    """The settings that decide about what is learnt, by dotted name, as plain values."""
    return {setting.name: setting.value for setting in _settings(config) if FREE not in setting.marks}


def naming(config: BaseModel) -> dict[str, Any]:
    """The deciding settings, but for those that came later and have their default."""
    return {
        setting.name: setting.value
        for setting in _settings(config)
        if FREE not in setting.marks and not (LATER in setting.marks and setting.is_default)
    }


class _Setting(NamedTuple):
    name: str
    value: Any  # plain
    marks: frozenset[Mark]  # its own and its sections'
    is_default: bool


def _settings(section: BaseModel, prefix: str = "", above: frozenset[Mark] = frozenset()) -> Iterator[_Setting]:
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        marks = above | {mark for mark in field.metadata if isinstance(mark, Mark)}
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _settings(value, f"{prefix}{name}.", marks)
        else:
            yield _Setting(f"{prefix}{name}", plain[name], marks, value == field.get_default())
    for name in section.__pydantic_extra__ or ():
        yield _Setting(f"{prefix}{name}", plain[name], above, False)
