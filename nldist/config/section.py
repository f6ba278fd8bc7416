"""What all parts of the configuration are made of."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag

from nldist.data.views import ViewOp


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _text(value: Any) -> Any:
    """Names that YAML reads as numbers, such as a run directory 2024, are names."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_text)]
File = Annotated[Path, BeforeValidator(_text)]

# What tells the two forms apart, in the places that pydantic gives of errors.
VIEW_FORMS = ("a view's name", "operations")
# The name of one of `views`, or a list of operations.
ViewChoice = Annotated[
    Annotated[str, Tag(VIEW_FORMS[0])] | Annotated[list[ViewOp], Tag(VIEW_FORMS[1])],
    Discriminator(lambda value: VIEW_FORMS[0] if isinstance(value, str) else VIEW_FORMS[1]),
]
