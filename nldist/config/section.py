"""What all parts of the configuration are made of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _text(value: Any) -> Any:
    """Names that YAML reads as numbers, such as a run directory 2024, are names."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_text)]
File = Annotated[Path, BeforeValidator(_text)]
