"""Reading a run's configuration: YAML with includes, overrides from the command line, errors that help."""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

import nldist
from nldist.config import Config
from nldist.config.section import VIEW_FORMS
from nldist.errors import UserError

_OWN = "nldist:"


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML configuration with its includes, then apply `section.key=value` overrides.

    `include: [FILE, ...]` (relative to the file that says it) is merged first, in order; the file itself wins. A file
    `nldist:cifar10/dividemix.yaml` is one of those that come with nldist.

    Raises:
        UserError: a missing file, broken YAML, an unknown key (with the nearest right one) or a wrong value.
    """
    values = _read(_located(str(path), Path()), ())
    for override in overrides:
        _apply(values, override)
    return _validated(values, path)


def parse_config(text: str, name: str) -> Config:
    """The configuration that `Config.to_yaml` wrote; `name` is what errors call it.

    Raises:
        UserError: a setting that does not exist (any more), or a wrong value.
    """
    return _validated(yaml.safe_load(text), name)


def _validated(values: Mapping[str, Any], name: str | Path) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name}: {explain(error)}") from None


def _located(name: str, folder: Path) -> Path:
    """The file that a configuration in `folder`, or the command line, means by `name`."""
    if not name.startswith(_OWN):
        return folder / name
    root, wanted = own_configs(), name.removeprefix(_OWN)
    if not (root / wanted).is_file():
        there = sorted(str(path.relative_to(root)) for path in root.rglob("*.yaml"))
        near = difflib.get_close_matches(wanted, there, n=1) or there
        raise UserError(f"{name} does not come with nldist; did you mean {_OWN}{near[0]}?")
    return root / wanted


def own_configs() -> Path:
    """The configurations that come with nldist: in the package where it is installed, else in its repository."""
    package = Path(nldist.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in parents:
        raise UserError(f"{path} includes itself, by way of {' -> '.join(p.name for p in parents)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"configuration {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as 'data:' and 'train:', not {type(values).__name__}")
    merged: dict[str, Any] = {}
    includes = values.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(include, str) for include in includes):
        raise UserError(f"{path}: include must be a list of files, not {includes!r}")
    for include in includes:
        merged = _merge(merged, _read(_located(include, path.parent), (*parents, path.resolve())))
    return _merge(merged, values)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override '{override}' must look like train.epochs=10")
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"override '{override}': {section} is a value, not a section")
    values[key] = _value(text)


def _value(text: str) -> Any:
    """What an override is set to: YAML, in which nothing is a comment."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    end = node.end_mark.index if node else 0
    return text if text[end:].strip() else value


def explain(error: ValidationError, schema: type[BaseModel] = Config) -> str:
    """The first problem as one line, with the nearest setting of `schema` where one is unknown."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in VIEW_FORMS)
    if first["type"] == "extra_forbidden":
        return f"{where} is not a setting{_nearest(first['loc'], schema)}"
    if first["type"] == "missing":
        return f"{where} is missing; set it in the file or as {where}=..."
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}={first['input']!r}: {message}" if where else message


def _nearest(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    model: Any = schema
    prefix = []
    for part in location[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            break
        prefix.append(str(part))
        model = next((t for t in (field.annotation, *get_args(field.annotation)) if hasattr(t, "model_fields")), None)
    wrong, everywhere = str(location[-1]), _all_settings(schema)
    here = [".".join([*prefix, name]) for name in getattr(model, "model_fields", {})]
    for candidates in (here, everywhere):
        by_name = {dotted.rpartition(".")[2]: dotted for dotted in reversed(candidates)}
        if close := difflib.get_close_matches(wrong, by_name, n=1, cutoff=0.6):
            return f"; did you mean {by_name[close[0]]}?"
    return f"; the settings here are {', '.join(here)}" if here else ""


def _all_settings(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and get_origin(kind) is None:
                names += _all_settings(kind, f"{prefix}{name}.")
    return names
