"""From a configuration to queued jobs: members of an array, stages that depend on each other, executors."""

import contextlib
import io
import itertools
import os
import re
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from nldist.config import Config
from nldist.config.file import load_config
from nldist.errors import UserError
from nldist.launch.job import Here, TrainJob
from nldist.launch.settings import Cluster, ClusterSettings
from nldist.launch.slurm import check_partition, has_slurm

_UNLIMITED_MINUTES = 60 * 24 * 365
_ARRAY_PARALLELISM = 256
_LAST_RANK_SECONDS = 60  # after the first one; a rank that fails gives MLflow and the others a few seconds each


@dataclass(frozen=True)
class Submission:
    """Jobs that were queued for one stage (or all): one, or one per member of an array."""

    stage: str | None
    jobs: list[submitit.Job[int]]


def members(path: Path, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Config]:
    """One configuration, or one for each combination of the sweeps' values.

    Args:
        path, overrides: of `load_config`.
        sweeps: KEY=VALUE,VALUE,... The runs' directories are below run.dir, named after their values.

    Raises:
        UserError: as `load_config`, or a sweep is malformed.
    """
    if not sweeps:
        return [load_config(path, overrides)]
    axes = []
    taken = {override.partition("=")[0] for override in overrides}
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        if not equals or not values or key == "run.dir":
            raise UserError(f"sweep '{sweep}' must look like optim.lr=0.01,0.02")
        if key in taken:
            raise UserError(f"sweep '{sweep}': {key} is given twice; leave one out")
        taken.add(key)
        axes.append([f"{key}={value}" for value in values.split(",")])
    root = load_config(path, overrides).run.dir
    names = [",".join(each) for each in itertools.product(*axes)]
    if len(set(names)) < len(names):
        raise UserError(f"sweep {' '.join(sweeps)} names a value twice")
    each_dir = [f"run.dir={root / name.replace('/', '_')}" for name in names]
    return [
        load_config(path, [*overrides, *each, run_dir])
        for each, run_dir in zip(itertools.product(*axes), each_dir, strict=True)
    ]


def seeds(text: str) -> str:
    """The sweep that "0-4" or "0,2,5" of --array-seeds stands for.

    Raises:
        UserError: it is neither.
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            numbers += range(int(first), int(last or first) + 1)
    except ValueError:
        numbers = []
    if not numbers:
        raise UserError(f"--array-seeds {text!r} must look like 0-4 or 0,2,5")
    return f"run.seed={','.join(map(str, numbers))}"


def check_cluster(cluster: Cluster, settings: ClusterSettings) -> None:
    """Refuse (UserError) what the cluster cannot do."""
    if cluster == "slurm":
        if not has_slurm():
            raise UserError("--cluster slurm: there is no sbatch here; submit from a login node or use --cluster local")
        check_partition(settings.partition)
        return
    if settings.nodes > 1:
        raise UserError(f"--cluster {cluster} has one node, not {settings.nodes}; leave --nodes out, or use slurm")
    if cluster == "debug" and settings.num_ranks > 1:
        raise UserError(f"--cluster debug runs one rank in this process, not {settings.num_ranks}; use --cluster local")
    num_gpus = len(gpus_here())
    if num_gpus < settings.gpus_per_node:
        raise UserError(f"--gpus-per-node {settings.gpus_per_node}: this machine has {num_gpus} GPU(s) for you")
    if num_gpus and not settings.gpus_per_node:
        print(f"the ranks use CPUs; --gpus-per-node {num_gpus} takes the GPU(s) of this machine", flush=True)


def executor(
    cluster: Cluster, folder: Path, name: str, settings: ClusterSettings, dependency: str | None = None
) -> submitit.AutoExecutor:
    """submitit's executor with the settings; its log files, one per rank, are in `folder`.

    Raises:
        UserError: the log files would be lost in a folder of this name.
    """
    _check_name(cluster, folder.absolute())
    # A job must not wait for ever for a stage that has failed.
    waits = {"kill-on-invalid-dep": "yes"} if dependency else {}
    chosen = submitit.AutoExecutor(folder=folder, cluster=cluster)
    parameters: dict[str, Any] = {
        "name": name,
        "nodes": settings.nodes,
        "tasks_per_node": settings.ranks_per_node,
        "timeout_min": settings.minutes if cluster == "slurm" else _UNLIMITED_MINUTES,
        "slurm_signal_delay_s": settings.grace_seconds,
        "slurm_setup": _setup(settings),
        "slurm_teardown": [
            "code=$?  # of srun, which is the command before",
            "trap '' TERM USR2  # the decision must not be interrupted",
            f"{shlex.quote(sys.executable)} -m nldist.launch.requeue $code "
            f"{shlex.quote(str(folder))} {settings.max_crashes}",
        ],
        "slurm_srun_args": _srun(settings),
        "slurm_additional_parameters": {"requeue": True, **waits, **settings.sbatch},
        "slurm_dependency": dependency,
        "slurm_array_parallelism": _ARRAY_PARALLELISM,
    }
    for option in ("gpus_per_node", "cpus_per_task", "mem_gb"):
        parameters[option] = getattr(settings, option) or None
    for option in ("partition", "account", "constraint", "qos"):
        parameters[f"slurm_{option}"] = getattr(settings, option)
    chosen.update_parameters(**{key: value for key, value in parameters.items() if value is not None})
    return chosen


def _check_name(cluster: Cluster, folder: Path) -> None:
    """Refuse (UserError) a folder in whose name submitit, or Slurm as well, would put in numbers of jobs and ranks."""
    if found := re.search("%" if cluster == "slurm" else "%[jtaA]", str(folder)):
        who, what = "Slurm" if cluster == "slurm" else "submitit", str(folder)[found.start() : found.start() + 2]
        raise UserError(f"{folder}: {who} puts something else in the place of {what}; take a path without %")


def _srun(settings: ClusterSettings) -> list[str]:
    """Where a rank dies the others must not wait for it for ever. And srun does not take its cores over from sbatch.

    The others notice it, report and end by themselves. With kill-on-bad-exit, which may be a cluster's default, they
    could not, and Slurm repeats its order to end the step until all nodes obey: up to minutes later, when the requeued
    job's step of the same number runs.
    """
    cores = [f"--cpus-per-task={settings.cpus_per_task}"] if settings.cpus_per_task else []
    return ["--kill-on-bad-exit=0", f"--wait={_LAST_RANK_SECONDS}", *cores, *settings.srun]


def _setup(settings: ClusterSettings) -> list[str]:
    """Shell lines before srun. Threads wait for each other asleep: spinning ones take the cores from data workers."""
    threads = settings.cpus_per_task or 1
    return [
        "trap : TERM USR2  # or this shell would end before it can requeue",
        f"export OMP_NUM_THREADS={threads}",
        "export OMP_WAIT_POLICY=passive",
        *settings.setup,
        "set +e  # or a rank's exit code would end this shell before it can requeue",
    ]


def sbatch_text(size: int, folder: Path, name: str, settings: ClusterSettings, dependency: str | None = None) -> str:
    """The batch file that would be submitted for a job, or for an array of this size."""
    slurm = executor("slurm", folder, name, settings, dependency)._executor
    assert isinstance(slurm, submitit.SlurmExecutor)
    if size > 1:
        slurm.parameters["map_count"] = size
    text: str = slurm._make_submission_file_text(slurm._submitit_command_str, "")
    return text


def submit(
    configs: Sequence[Config],
    cluster: Cluster,
    folder: Path,
    settings: ClusterSettings,
    stages: Sequence[str] | None,
) -> Iterator[Submission]:
    """Queue the jobs, one after the other as they are asked for.

    Args:
        configs: of the members of an array; one is a job of its own.
        cluster, settings: where, and with what.
        folder: of log files, in the directory that the jobs are named after.
        stages: a job for each of these, which starts when the one before has ended well; None = one job for all.

    Raises:
        UserError: Slurm refused.
    """
    before: Submission | None = None
    for stage in stages if stages is not None else [None]:
        name = folder.parent.name
        dependency = after(before.jobs[0].job_id.partition("_")[0], len(before.jobs)) if before else None
        chosen = executor(cluster, folder, f"{name}-{stage}" if stage else name, settings, dependency)
        here = Here(free_port(), ",".join(gpus_here()[: settings.gpus_per_node])) if cluster != "slurm" else None
        jobs = [TrainJob(config.to_yaml(), [stage] if stage else None, here) for config in configs]
        before = Submission(stage, queue(chosen, jobs))
        yield before


def after(job: str, size: int) -> str:
    """Slurm's dependency on a job; of an array every member waits for its own forerunner."""
    return f"aftercorr:{job}" if size > 1 else f"afterok:{job}"


def queue(chosen: submitit.AutoExecutor, jobs: Sequence[Callable[[], int]]) -> list[submitit.Job[int]]:
    """Queue a job, or an array of them. Raises UserError if Slurm refuses."""
    # Ctrl-C goes to all processes of a terminal. Ranks save then; submitit's controller would kill them, so it is deaf.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit shows sbatch's, and then raises it
            if len(jobs) == 1:
                return [chosen.submit(jobs[0])]
            with chosen.batch():
                return [chosen.submit(job) for job in jobs]
    except FailedJobError as error:
        raise UserError(f"Slurm refused the job: {str(error).strip().splitlines()[-1]}") from None
    finally:
        signal.signal(signal.SIGINT, handler)


def gpus_here() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    ours = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ours.split(",") if ours else [str(number) for number in range(torch.cuda.device_count())]


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def share_cores(settings: ClusterSettings) -> None:
    """Threads of the ranks on this machine, where the environment does not say."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // settings.ranks_per_node)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
