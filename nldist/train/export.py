"""A run's networks for other programs: as plain weights, and as an MLflow model."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nldist import __version__
from nldist.config import Config
from nldist.config.run import TrackSection
from nldist.errors import UserError
from nldist.files import replacing
from nldist.models.plain import plain_state
from nldist.run.classifier import resize_of
from nldist.run.directory import RunDirectory, networks_of
from nldist.track.sender import STATE_FILE, reason
from nldist.track.store import connect, masked

PLAIN = (".safetensors", ".pt", ".pth")
LOADER = "nldist.train.serve"  # the module that MLflow loads a model with
Weights = Literal["last", "best"]


def export_plain(run_dir: Path, out: Path, weights: Weights = "last", number: int | None = None) -> None:
    """Write one network of a run as a checkpoint that timm loads, with facts that are needed to use it.

    Args:
        run_dir: the run's.
        out: .safetensors, with the facts as metadata (JSON); or .pt, a dictionary with "state_dict" and the facts.
        weights: which file of the run.
        number: of the network; None: the only one.

    Raises:
        UserError: no such run, weights or network; `out` exists; or timm's classifier of this name is another one.
    """
    _check_free(out)
    run = RunDirectory(run_dir)
    config, saved = run.config(), run.load_weights(weights)
    networks = networks_of(saved)
    if number is None and len(networks) > 1:
        last = len(networks) - 1
        raise UserError(
            f"{run_dir} has {len(networks)} networks and such a file holds one: say --network 0 (to {last}), "
            "or export an MLflow model (a directory), which answers with all of them together"
        )
    if not 0 <= (number or 0) < len(networks):
        raise UserError(f"--network {number}: {run_dir} has {len(networks)}")
    state = plain_state(networks[number or 0], saved["model"])
    epochs = saved["epoch"]  # of train.best=each one for each network
    epoch = epochs[number or 0] if isinstance(epochs, list) else epochs
    facts = _facts(config, saved) | {"network": number or 0, "epoch": epoch}
    with _writing(out) as aside:
        if out.suffix == ".safetensors":
            texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
            # Copies: safetensors refuses views.
            plain = {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}
            save_file(plain, aside, {"format": "pt", **texts})
        else:
            torch.save({**facts, "state_dict": state}, aside)


def _facts(config: Config, saved: dict[str, Any]) -> dict[str, Any]:
    """What is needed to use the weights, as plain values."""
    view = config.model_dump(mode="json")["views"]["eval"]
    return {
        "architecture": saved["model"],
        "num_classes": len(saved["classes"]),
        "label_names": saved["classes"],
        "mean": list(config.data.mean),
        "std": list(config.data.std),
        "resize": resize_of(saved, config),
        "view": view,
        "epoch": saved["epoch"],
        "nldist": __version__,
    }


def export_model(run_dir: Path, out: Path, weights: Weights = "last") -> None:
    """Write an MLflow model, a directory: all networks of a run with its evaluation view.

    Raises:
        UserError: no such run or weights, or `out` exists or cannot be written.
    """
    _check_free(out)
    from mlflow import pyfunc

    try:
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as work:
            pyfunc.save_model(Path(work, "model"), **_model(run_dir, Path(work), weights))
            Path(work, "model").rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None


def log_model(run_dir: Path, weights: Weights = "last") -> str:
    """Put the model into the MLflow run of a training; returns its URI. Changes to the directory of a SQLite store.

    Raises:
        UserError: no such run or weights, MLflow has no run of it, or does not take the model.
    """
    run_dir = run_dir.absolute()
    try:
        state = json.loads((run_dir / STATE_FILE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        state = {}
    if not state.get("run_id"):
        raise UserError(f"MLflow has no run of {run_dir}: if it was tracked with MLflow, nldist sync {run_dir} first")
    import mlflow
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="nldist-") as work:
        content = _model(run_dir, Path(work), weights)
        try:
            client, _ = connect(state["uri"])
            mlflow.set_tracking_uri(client.tracking_uri)
            mlflow.set_experiment(experiment_id=state["experiment_id"])  # else the model is in another than its run
            info = Model.log(None, name="model", flavor=mlflow.pyfunc, run_id=state["run_id"], **content)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"MLflow at {masked(state['uri'])} did not take the model: {reason(error)}") from None
    return f"runs:/{state['run_id']}/model in {masked(state['uri'])}, also known as {info.model_uri}"


def _model(run_dir: Path, work: Path, weights: Weights) -> dict[str, Any]:
    """What MLflow is told of the model: a run directory with nothing but configuration and weights, in `work`."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    run = RunDirectory(run_dir)
    config, saved = run.config(), run.load_weights(weights)
    bundle = RunDirectory(work / "run")
    (bundle.path / "weights").mkdir(parents=True)
    bundle.write_config(config.model_copy(update={"track": TrackSection()}))  # a store's URI may hold a password
    networks = saved.pop("networks")
    bundle.save_weights("last", networks, saved | {"resize": resize_of(saved, config)})
    outputs = [ColSpec("string", "label"), ColSpec("integer", "label_id"), ColSpec("float", "probability")]
    return {
        "loader_module": LOADER,
        "data_path": str(bundle.path),
        "signature": ModelSignature(
            Schema([ColSpec("binary", "image")]),
            Schema(outputs),
            ParamSchema([ParamSpec("top", "integer", 1)]),
        ),
        "pip_requirements": [f"nldist=={__version__}"],
        "metadata": {"classes": saved["classes"], "weights": weights, "epoch": saved["epoch"]},
    }


def _check_free(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists: choose another name, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.absolute().parent}")


@contextmanager
def _writing(out: Path) -> Iterator[Path]:
    try:
        with replacing(out) as aside:
            yield aside
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as RuntimeError
        raise UserError(f"{out} cannot be written: {getattr(error, 'strerror', None) or error}") from None
