"""Methods x seeds on the same data and label set: which runs are missing, and running them."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit

from nldist.config import Config
from nldist.config.file import load_config
from nldist.data.make.lock import locked
from nldist.dist.stop import EXIT_STOPPED
from nldist.errors import UserError
from nldist.files import write_text
from nldist.launch.checks import check, claim
from nldist.launch.follow import wait
from nldist.launch.settings import Cluster, ClusterSettings
from nldist.launch.slurm import is_queued
from nldist.launch.submit import share_cores, submit
from nldist.run.directory import RunDirectory
from nldist.track.store import store_uri
from nldist.track.tracker import NullTracker, Tracker

JOBS_FILE = ".jobs.json"  # in the comparison's directory: the queued job of each run
LOCK_FILE = ".queueing.lock"
EXIT_INTERRUPTED = 130
_MLFLOW_SECONDS = 30  # for the parent run to come into being before the others begin


class Comparison:
    """The runs of some methods and seeds, in directories METHOD-SEED below `root`, which is run.dir.

    Args:
        path, overrides: of `load_config`.
        methods: values of method.name.
        num_seeds: seeds 0 to this less 1.
        settings: of each run's ranks.

    Raises:
        UserError: what a run would refuse when it starts, for any of them.
    """

    def __init__(
        self, path: Path, overrides: Sequence[str], methods: Sequence[str], num_seeds: int, settings: ClusterSettings
    ) -> None:
        for key in {"method.name", "run.seed"} & {override.partition("=")[0] for override in overrides}:
            raise UserError(f"{key} is what a comparison varies (--methods, --seeds); leave it out")
        self.root = load_config(path, [*overrides, f"method.name={methods[0]}"]).run.dir
        self.configs = [
            load_config(
                path,
                [*overrides, f"method.name={name}", f"run.seed={seed}", f"run.dir={self.root / f'{name}-{seed}'}"],
            )
            for name in methods
            for seed in range(num_seeds)
        ]
        if (self.root / "config.yaml").exists():
            raise UserError(f"{self.root} is a run itself; set another run.dir for the comparison")
        self._methods, self._num_seeds, self._settings = methods, num_seeds, settings
        for config in self.configs:
            _check_finished(config)
        check(self.configs, settings)

    @property
    def missing(self) -> list[Config]:
        """The runs that have not ended, or not with as many epochs as are asked for."""
        return [config for config in self.configs if not _is_done(config)]

    def run(self, cluster: Cluster, tracker: Tracker) -> int:
        """Run what is missing and does not run already; returns the exit code of what did not end well."""
        if tracker.job is not None:
            until = time.monotonic() + _MLFLOW_SECONDS
            while tracker.mlflow_run_id is None and time.monotonic() < until:
                time.sleep(0.2)
            self.configs = [_below(config, tracker.job) for config in self.configs]
        if cluster == "slurm":
            return self._run_array()
        share_cores(self._settings)
        missing, worst = self.missing, 0
        claim(missing)
        for number, config in enumerate(missing, start=1):
            print(f"run {number} of {len(missing)}: {config.run.dir}", flush=True)
            code = self._run_here(config, cluster)
            if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
                return code
            worst = worst or code  # the others need not wait for one that fails
        return worst

    def _run_here(self, config: Config, cluster: Cluster) -> int:
        (submission,) = submit([config], cluster, self._logs, self._settings, None)
        return max(job.result() for job in submission.jobs) if cluster == "debug" else wait(submission.jobs)

    def _run_array(self) -> int:
        with locked(self.root / LOCK_FILE, f"{self.root}: another start of this comparison is queueing its jobs"):
            queued = self._queued()
            waiting = [config for config in self.missing if config.run.dir.name not in queued]
            claim(waiting)
            jobs = list(queued.values())
            if waiting:
                (submission,) = submit(waiting, "slurm", self._logs, self._settings, None)
                jobs += submission.jobs
                queued |= {config.run.dir.name: job for config, job in zip(waiting, submission.jobs, strict=True)}
                write_text(self.root / JOBS_FILE, json.dumps({run: job.job_id for run, job in queued.items()}))
        print(f"{len(waiting)} run(s) queued, {len(jobs) - len(waiting)} queued before", flush=True)
        return wait(jobs) if jobs else 0

    @property
    def _logs(self) -> Path:
        return (self.root / "logs").absolute()

    def _queued(self) -> dict[str, submitit.Job[int]]:
        """The jobs of an earlier start of this comparison that have not ended, by the name of the run directory."""
        file = self.root / JOBS_FILE
        known = json.loads(file.read_text()) if file.exists() else {}
        names = {config.run.dir.name for config in self.missing}
        return {
            run: submitit.SlurmJob(self._logs, job, tasks=list(range(self._settings.num_ranks)))
            for run, job in known.items()
            if run in names and is_queued(job)
        }

    @contextlib.contextmanager
    def tracked(self) -> Iterator[Tracker]:
        """The MLflow run that those of the comparison are nested under."""
        first = self.configs[0]
        shared = {
            key: value for key, value in first.flat().items() if all(c.flat()[key] == value for c in self.configs)
        }
        params: dict[str, Any] = {"methods": ",".join(self._methods), "seeds": self._num_seeds}
        tracker: Tracker = NullTracker()
        if first.track.enabled:
            self.root.mkdir(parents=True, exist_ok=True)
            tracker = Tracker(
                self.root,
                uri=store_uri(first),
                experiment=first.track.experiment,
                run_name=first.track.run_name or self.root.name,
                params=params | shared | {"world_size": self._settings.num_ranks},
            )
        try:
            yield tracker
        except BaseException:
            tracker.end("KILLED", 3)
            raise
        tracker.end("KILLED" if self.missing else "FINISHED")


def _epochs(config: Config) -> int | None:
    """The train.epochs with which this run has ended; None: it has not."""
    run = RunDirectory(config.run.dir)
    if run.summary is None:
        return None
    epochs: int = run.summary.get("train_epochs", run.config().train.epochs)  # before 0.2 it was not in the summary
    return epochs


def _is_done(config: Config) -> bool:
    return _epochs(config) == config.train.epochs


def _check_finished(config: Config) -> None:
    """Refuse (UserError) a run that has ended with other settings, or with more epochs."""
    if (epochs := _epochs(config)) is None:
        return
    if epochs > config.train.epochs:
        raise UserError(
            f"{config.run.dir} has ended with train.epochs={epochs}; ask for as many, or set another run.dir"
        )
    claim([config])


def _below(config: Config, parent: str) -> Config:
    return config.model_copy(update={"track": config.track.model_copy(update={"parent": parent})})


def check_methods(methods: Sequence[str], num_seeds: int) -> None:
    """Refuse (UserError) what is no comparison."""
    if not all(methods) or len(set(methods)) < len(methods):
        raise UserError(f"--methods {','.join(methods)}: give each method once, such as cross_entropy,dividemix")
    if num_seeds < 1:
        raise UserError(f"--seeds {num_seeds}: a comparison has 1 seed or more")
