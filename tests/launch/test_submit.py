import copy
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from nldist.cli.submit import main
from nldist.config.file import load_config
from nldist.errors import UserError
from nldist.launch.checks import check
from nldist.launch.job import TrainJob
from nldist.launch.settings import ClusterSettings
from nldist.launch.submit import after, executor, members, sbatch_text, seeds
from tests.commands import Command
from tests.conftest import REPOSITORY
from tests.jobs import run_job
from tests.test_train import assert_same_weights, epoch_records

DIGITS = REPOSITORY / "tests" / "digits.yaml"
Start = Callable[[Path], Command]
GOLDEN = Path(__file__).with_name("sbatch.golden")
SHORT = (
    *("train.epochs=3", "method.dividemix.warmup_epochs=1", "dist.device=cpu"),
    *("train.batch_size=32", "train.checkpoint_every_steps=3"),
)


@pytest.fixture
def slurm_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slurm is not installed: commands that are only looked for. (tests/slurm has a real cluster.)"""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("srun", "sbatch"):
        (commands / name).write_text("#!/bin/sh\nexit 1\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")


@pytest.mark.usefixtures("slurm_commands")
def test_the_batch_file_is_the_golden_one(digits: Path) -> None:
    configs = members(DIGITS, [f"data.root={digits}", "run.dir=runs/x"], ["run.seed=0,1", "optim.lr=0.1"])
    assert [str(config.run.dir) for config in configs] == [f"runs/x/run.seed={seed},optim.lr=0.1" for seed in (0, 1)]
    settings = ClusterSettings(
        partition="gpu", account="vision", nodes=2, gpus_per_node=8, cpus_per_task=6, setup=["module load cuda"]
    )
    text = sbatch_text(len(configs), Path("/runs/x/logs"), "x", settings)
    assert text.replace(sys.executable, "PYTHON") == GOLDEN.read_text()
    later = sbatch_text(len(configs), Path("/runs/x/logs"), "x", settings, after("JOB-mine", 2)).splitlines()
    new = {"#SBATCH --dependency=aftercorr:JOB-mine", "#SBATCH --kill-on-invalid-dep=yes"}
    assert set(later) - set(text.splitlines()) == new


@pytest.mark.usefixtures("slurm_commands")
@pytest.mark.parametrize(
    ("cluster", "name", "lost"),
    [("slurm", "40%noise", "%n"), ("slurm", "40%", "%/"), ("local", "50%test", "%t"), ("local", "40%noise", None)],
)
def test_a_name_in_which_logs_would_be_lost_is_refused(
    cluster: Literal["slurm", "local"], name: str, lost: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / name / "logs"
    if lost is None:
        paths = executor(cluster, folder, "x", ClusterSettings())._executor.job_class(folder, "7", [0]).paths
        assert paths.stdout == folder / "7_0_log.out"
    else:
        with pytest.raises(UserError, match=f"in the place of {lost}; take a path without %"):
            executor(cluster, folder, "x", ClusterSettings())


def test_where_slurm_is_not_installed_it_says_so(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(DIGITS), f"data.root={digits}", f"run.dir={tmp_path}/run", "--cluster", "slurm"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == ("error: --cluster slurm: there is no sbatch here; submit from a login node or use --cluster local")


def test_debug_runs_in_this_process(digits: Path, tmp_path: Path) -> None:
    settings = [f"data.root={digits}", f"run.dir={tmp_path}/run", "track.enabled=false", *SHORT, "train.epochs=1"]
    done = Command(main, [DIGITS, *settings, "--cluster", "debug"], tmp_path, os.environ).wait()
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(
    ("text", "sweep"), [("0-2", "run.seed=0,1,2"), ("3", "run.seed=3"), ("0,5-6", "run.seed=0,5,6")]
)
def test_seeds(text: str, sweep: str) -> None:
    assert seeds(text) == sweep


def test_members_of_an_array(digits: Path) -> None:
    with pytest.raises(UserError, match="must look like 0-4"):
        seeds("many")
    for sweep, words in (("optim.lr", r"must look like optim.lr=0.01,0.02"), ("run.seed=0,0", "names a value twice")):
        with pytest.raises(UserError, match=words):
            members(DIGITS, [f"data.root={digits}"], [sweep])
    with pytest.raises(UserError, match=r"run.seed is given twice"):
        members(DIGITS, ["run.seed=1"], ["run.seed=0,1"])
    with pytest.raises(UserError, match=r"run.seed is given twice"):
        members(DIGITS, [], ["run.seed=0,1", "run.seed=2,3"])
    (config,) = members(DIGITS, ["run.dir=runs/x"], ["data.root=a/b"])
    assert config.run.dir == Path("runs/x/data.root=a_b"), "one directory, next to the others"


def test_each_member_that_is_another_run_is_checked(digits: Path) -> None:
    configs = members(DIGITS, [f"data.root={digits}", "run.dir=runs/x"], ["model.name=small_cnn,resnt18"])
    with pytest.raises(UserError, match="resnt18"):
        check(configs, ClusterSettings())


def test_members_that_share_a_stage_are_refused(digits: Path, tmp_path: Path) -> None:
    settings = [f"data.root={digits}", f"run.dir={tmp_path}/run", "method.name=scanmix", f"run.stages_dir={tmp_path}"]
    configs = members(DIGITS, settings, ["optim.lr=0.1,0.2"])
    with pytest.raises(UserError, match=r"runs of the array share the stage .*pretext-"):
        check(configs, ClusterSettings())
    check(members(DIGITS, settings, ["run.seed=0,1"]), ClusterSettings())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodse", "2"], "unknown option --nodse; did you mean --nodes?"),
        (["--nodes", "two"], "invalid int value: 'two'"),
        (["--nodes", "2"], "--cluster local has one node, not 2"),
        (["--partition", "gpu"], "--partition is for Slurm; leave it out with --cluster local"),
        (["--stages"], "with --cluster local one job runs all stages"),
        (["--array-seeds", "0-1"], "an array of runs is for Slurm"),
        (["--gpus-per-node", "64"], "--gpus-per-node 64: this machine has"),
        (["data.root=nowhere"], "nowhere"),
        (["data.label_set=sym99"], "sym99"),
        (["train.epoch=1"], "did you mean train.epochs?"),
        (["--tasks-per-node", "2000"], "too few for 2000 ranks"),
    ],
)
def test_wrong_options_are_one_line_before_anything_starts(
    arguments: list[str], words: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(DIGITS), f"data.root={digits}", f"run.dir={tmp_path}/run", "--cluster", "local", *arguments]
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def start(few_digits: Path) -> Iterator[Start]:
    """Starts two local ranks through the launcher, in a session of their own; ends what a failed test has left."""
    jobs: list[Command] = []

    def begin(run_dir: Path) -> Command:
        settings = (f"data.root={few_digits}", f"run.dir={run_dir}", "track.every_seconds=0.001", "track.enabled=false")
        options = ("--cluster=local", "--tasks-per-node=2", "--wait")
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        jobs.append(Command(main, [DIGITS, *settings, *SHORT, *options], run_dir.parent, env))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.is_alive():
            for process in [*psutil.Process(job.pid).children(recursive=True), job.process]:
                process.kill()
            job.wait()


def wait_for_step(run_dir: Path, num_steps: int) -> None:
    """Until the run's first pass has done so many steps."""
    for _ in range(1800):
        time.sleep(0.1)
        status = run_dir / "status.json"
        if status.exists() and json.loads(status.read_text()).get("step", 0) >= num_steps:
            return
    raise AssertionError(f"{run_dir} has not come to step {num_steps}")


@pytest.fixture(scope="module")
def undisturbed(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_job(run_dir, f"data.root={few_digits}", *SHORT, world_size=2) == [0, 0]
    return run_dir


def test_ctrl_c_saves_and_the_same_command_goes_on(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(run_dir)
    wait_for_step(run_dir, 4)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does
    done = job.wait()
    assert done.returncode == 143
    assert "ended: STOPPED" in done.stdout + done.stderr
    assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"
    done = start(run_dir).wait()
    assert done.returncode == 0, done
    for part in ("resumed from", "epoch 3/3", "COMPLETED", f"nldist status {run_dir}", f"runs in    {run_dir}"):
        assert part in done.stdout
    assert_same_weights(undisturbed, run_dir)
    assert epoch_records(undisturbed) == epoch_records(run_dir)


def test_a_killed_rank_ends_the_job_and_leaves_no_process(start: Start, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(run_dir)
    wait_for_step(run_dir, 2)
    processes = psutil.Process(job.pid).children(recursive=True)
    ranks = [p for p in processes if "submitit.core._submit" in p.cmdline()]
    os.kill(max(p.pid for p in ranks), signal.SIGKILL)
    done = job.wait()
    assert done.returncode == 1, done
    assert "ended: FAILED" in done.stdout + done.stderr
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_a_job_at_the_user_s_signal_is_started_again(start: Start, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(run_dir)
    wait_for_step(run_dir, 3)
    processes = psutil.Process(job.pid).children(recursive=True)
    for process in processes:
        if "submitit.core._submit" in process.cmdline():
            process.send_signal(signal.SIGUSR2)
    done = job.wait()
    assert done.returncode == 0, done
    assert "all saved" in done.stdout
    assert "resumed from" in done.stdout
    assert_same_weights(undisturbed, run_dir)


def test_a_job_that_the_release_before_queued_is_understood(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds a Config object as that release made it: without mine.view."""
    config = load_config(DIGITS, [f"data.root={digits}", "method.name=scanmix"])
    old = copy.deepcopy(config)
    del old.mine.__dict__["view"]
    job = TrainJob.__new__(TrainJob)
    job.__setstate__(pickle.loads(pickle.dumps({"config": old, "stages": ["mine"], "here": None})))
    ran = []

    def train(*arguments: Any) -> int:
        ran.append(arguments)
        return 0

    monkeypatch.setattr("nldist.train.stages.train", train)
    assert job() == 0
    assert ran == [(config, ["mine"])]


def test_a_queued_job_is_validated_where_it_runs(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = load_config(DIGITS, [f"data.root={digits}"]).to_yaml().replace("keep_checkpoints", "kept_checkpoints")
    with pytest.raises(SystemExit) as end:
        pickle.loads(pickle.dumps(TrainJob(text)))()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "the job's configuration: train.kept_checkpoints is not a setting; did you mean train.keep_checkpoints?" in line
    )
