"""Weights from a local checkpoint file into a classifier."""

import hashlib
import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nldist.errors import UserError
from nldist.models.network import Network

log = logging.getLogger(__name__)
State = dict[str, torch.Tensor]


def load_pretrained(model: Network, path: Path, *, head_name: str) -> None:
    """Load the backbone of `model` from `path`, and the head where the file has one of the same shape.

    The file holds either a `Network` (keys "backbone." and "head.") or a plain backbone whose head is
    called `head_name`; "module." before all keys and a wrapping "state_dict" or "model" entry are undone.

    Raises:
        UserError: the file is missing or unreadable, or lacks a backbone tensor, or has one of another shape.
    """
    state = _unwrapped(_read(path), path)
    if any(key.startswith("backbone.") for key in state):
        backbone, head_name = _under(state, "backbone."), "head"
    else:
        backbone = state
    _load_backbone(model, backbone, path)
    head = _under(state, f"{head_name}.")
    own = model.heads["classify"]
    if _shapes(head) == _shapes(own.state_dict()):
        own.load_state_dict(head)
    else:
        log.info("%s: its head does not fit %d classes and is left out", path, own.out_features)


def weights_digest(path: Path) -> str:
    """SHA-256 of a checkpoint file's bytes.

    Raises:
        UserError: the file is missing or unreadable.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"pretrained weights {path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def _load_backbone(model: Network, state: State, path: Path) -> None:
    wanted = model.backbone.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise UserError(f"{path} does not fit the model: it lacks {_some(missing)}; is it of another backbone?")
    wrong = [key for key in wanted if wanted[key].shape != state[key].shape]
    if wrong:
        raise UserError(f"{path} does not fit the model: other shapes for {_some(wrong)}; is it of another backbone?")
    model.backbone.load_state_dict({key: state[key] for key in wanted})


def _read(path: Path) -> object:
    if not path.is_file():
        raise UserError(f"pretrained weights {path} do not exist: give the path of a local checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read weights from {path}: {reason}; it must hold tensors only") from error


def _unwrapped(content: object, path: Path) -> State:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dictionary: save model.state_dict()")
    if content and all(key.startswith("module.") for key in content):
        return _under(content, "module.")
    return content


def _under(state: State, prefix: str) -> State:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _shapes(state: State) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest
