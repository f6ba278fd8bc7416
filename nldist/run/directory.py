"""A run directory: one job at a time, one configuration for its life, its weights and its summary."""

import errno
import fcntl
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml

from nldist.config import Config
from nldist.config.file import load_config, parse_config
from nldist.config.marks import deciding, free_sections
from nldist.dist.checkpoint import load_file, newest_shared, save_file
from nldist.errors import UserError
from nldist.files import write_text
from nldist.models import Network, build_model, check_revision
from nldist.run.status import LOCK_FILE, SUMMARY_FILE, read_summary


class RunDirectory:
    """RUN/: config.yaml metrics.jsonl summary.json checkpoints/ weights/ tables/ plots/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    def claim(self, config: Config | None, advice: str = "set another run.dir", *, patience_seconds: float = 0) -> None:
        """Make the directory this job's, with this configuration (None: whatever it is). For rank 0.

        Raises:
            UserError: another job is using it (with `advice`), or it holds a run with other settings.
            TimeoutError: another job is using it, also after `patience_seconds`.
        """
        try:
            for name in ("checkpoints", "weights", "tables", "plots"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK_FILE).open("w")
        except OSError as error:
            raise UserError(f"run directory {self.path} cannot be written: {error.strerror}") from None
        try:
            self._wait(advice, patience_seconds)
            if config is not None:
                self._check_same(config)
        except BaseException:
            self.close()
            raise

    def _wait(self, advice: str, patience_seconds: float) -> None:
        until = time.monotonic() + patience_seconds
        while not self._locked():
            if time.monotonic() > until:
                problem = f"{self.path} is in use by a running job"
                if patience_seconds:  # its forerunner is about to end: worth another start
                    raise TimeoutError(f"{problem}, after {patience_seconds:.0f} s still")
                raise UserError(f"{problem}; {advice}")
            time.sleep(0.5)

    def _locked(self) -> bool:
        assert self._lock is not None
        try:
            # Not flock, which forked data workers would inherit and keep when their rank is killed.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise UserError(f"{self.path} cannot be locked ({error.strerror}): its file system needs locks") from None
        return True

    def close(self) -> None:
        """Leave the directory to other jobs, if it was claimed."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_config(self, config: Config) -> None:
        """Write config.yaml, once all of it has proved usable."""
        write_text(self.path / "config.yaml", config.to_yaml())

    def _check_same(self, config: Config) -> None:
        file = self.path / "config.yaml"
        if not file.exists() or not any((self.path / "checkpoints").iterdir()):
            return
        # Through the same classes: a setting that this run did not have has its default. In sections that decide
        # nothing it may have had what there is no more.
        free = config.model_dump(mode="json", include=free_sections(Config))
        saved = parse_config(yaml.safe_dump(yaml.safe_load(file.read_text()) | free), str(file))
        before, after = deciding(saved), deciding(config)
        longer = config.optim.schedule != "cosine"  # whose rates depend on the number of epochs
        changed = [
            f"{key} ({before.get(key)} -> {after.get(key)})"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and not (longer and key == "train.epochs")
        ]
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise UserError(
                f"{self.path} holds a run with other settings: {', '.join(changed[:3])}{more}; "
                "set another run.dir or delete the old run"
            )
        if self.summary is None or after["train.epochs"] > before["train.epochs"]:
            self._check_network(config.model.name)

    def _check_network(self, name: str) -> None:
        """Refuse (UserError) to go on with a network of this name from what an earlier nldist saved of another one."""
        if (shared := newest_shared(self.path / "checkpoints")) is not None:
            check_revision(shared, name, self.path)

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """The configuration that the run was started with, with overrides such as data.root=..."""
        if not (self.path / "config.yaml").exists():
            raise UserError(f"{self.path} is not a run directory: it has no config.yaml")
        return load_config(self.path / "config.yaml", overrides)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What summary.json holds; None until the run has ended."""
        return read_summary(self.path)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json whole."""
        write_text(self.path / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")

    def save_weights(self, which: str, states: list[dict[str, torch.Tensor]], facts: dict[str, Any]) -> None:
        """Write weights/WHICH.pt: {"networks": [state dict, ...], ...facts}, loadable with weights_only=True."""
        path = self.path / "weights" / f"{which}.pt"
        # Copies: an engine's tensors may be views into larger ones, which would be saved whole.
        plain = [{name: value.to("cpu", copy=True) for name, value in state.items()} for state in states]
        try:
            save_file(facts | {"networks": plain}, path)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise UserError(f"{path} was not saved: {error}; free some space") from None

    def load_weights(self, which: str) -> dict[str, Any]:
        """What weights/WHICH.pt holds (see `save_weights`), of networks that predict classes.

        Raises:
            UserError: the run has no such weights, or they are of a stage before the training.
        """
        file = self.path / "weights" / f"{which}.pt"
        if not file.exists():
            raise UserError(f"{self.path} has no weights/{which}.pt yet: no epoch has ended")
        saved: dict[str, Any] = load_file(file)
        if saved["stage"] != "train":
            raise UserError(f"{self.path} holds the stage {saved['stage']} of a run, which predicts no classes")
        check_revision(saved, saved["model"], file)
        return saved


def networks_of(saved: Mapping[str, Any]) -> list[Network]:
    """The networks of a weights file in eval mode."""
    networks = []
    for state in saved["networks"]:
        network = build_model(saved["model"], len(saved["classes"]))
        network.load_state_dict(state)
        networks.append(network.eval())
    return networks
