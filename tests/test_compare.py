"""nldist compare: methods x seeds as real runs, and runs that have ended."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nldist import __version__
from nldist.cli import main
from nldist.cli.compare import main as compare
from nldist.config import Config
from nldist.errors import UserError
from nldist.launch.comparison import Comparison
from nldist.launch.settings import ClusterSettings
from nldist.report.compare import Finished, Group, as_markdown, as_text, grouped, read, row
from nldist.track.tracker import NullTracker
from tests.commands import Command
from tests.jobs import DIGITS, run_job
from tests.mlflow_server import client

METHODS = ("cross_entropy", "mixup")
SETTINGS = (
    "train.epochs=4",
    "train.batch_size=16",
    "dist.device=cpu",
    "--methods=cross_entropy,mixup",
    "--seeds=1",
    "--cluster=local",
)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_for(file: Path, command: Command) -> None:
    for _ in range(1200):
        if file.exists():
            return
        assert command.process.is_alive()
        time.sleep(0.1)
    raise TimeoutError(file)


def test_stopped_it_goes_on_with_what_is_missing_and_compares_all(few_digits: Path, tmp_path: Path) -> None:
    root, env = tmp_path / "study", {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    arguments = (DIGITS, f"data.root={few_digits}", f"run.dir={root}", *SETTINGS)
    first = Command(compare, arguments, tmp_path / "first", env)
    wait_for(root / "cross_entropy-0" / "summary.json", first)
    wait_for(root / "mixup-0" / "metrics.jsonl", first)
    os.kill(first.pid, signal.SIGINT)
    assert first.wait().returncode != 0
    assert not (root / "mixup-0" / "summary.json").exists()
    done = (root / "cross_entropy-0" / "summary.json").stat().st_mtime_ns

    second = Command(compare, arguments, tmp_path / "second", env).wait()
    assert second.returncode == 0, second.stderr
    assert "run 1 of 1" in second.stdout
    assert (root / "cross_entropy-0" / "summary.json").stat().st_mtime_ns == done
    rows = json.loads((root / "table.json").read_text())
    assert [values["method"] for values in rows] == list(METHODS)
    for values in rows:
        epochs = [line["accuracy"] for line in lines(root / f"{values['method']}-0") if line["kind"] == "epoch"]
        assert len(epochs) == 4
        assert (values["seeds"], values["last_deviation"]) == ([0], None)
        assert values["last"] == pytest.approx(sum(epochs) / 4)
    table = [line.split() for line in second.stdout.splitlines()[-2:]]
    assert [words[:2] for words in table] == [[name, "1"] for name in METHODS]
    assert (root / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert_nested(root)


def assert_nested(root: Path) -> None:
    """One MLflow run for the comparison, with its files, and those of the methods and seeds below it."""
    store = client(f"sqlite:///{root / 'mlflow.db'}")
    runs = store.search_runs([experiment.experiment_id for experiment in store.search_experiments()])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["study"]
    files = {file.path for file in store.list_artifacts(parents[0].info.run_id)}
    assert files == {"table.md", "table.json", "accuracy.png"}
    below = {run.info.run_name: run for run in runs if run is not parents[0]}
    assert set(below) == {f"{name}-0" for name in METHODS}
    for run in below.values():
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        tags = {
            key: run.data.tags[key] for key in ("method", "label_set", "num_samples", "seed", "world_size", "nldist")
        }
        name, _, seed = str(run.info.run_name).rpartition("-")
        expected = {"method": name, "label_set": "sym50", "num_samples": "479", "seed": seed, "world_size": "1"}
        assert tags == expected | {"nldist": __version__}
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_finished_run_counts_only_for_what_was_asked(digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "study"
    root.mkdir()
    step = ("optim.schedule=step", "track.enabled=false")
    settings = (f"data.root={digits}", "method.name=mixup", *step)
    assert run_job(root / "mixup-0", *settings, "train.epochs=2") == [0]
    # An extension that was killed before its first epoch ended: the summary is still that of two epochs.
    assert run_job(root / "mixup-0", *settings, "train.epochs=4", kill=(0, 3)) == [-9]
    overrides = (f"data.root={digits}", f"run.dir={root}", *step)

    def comparison(*more: str) -> Comparison:
        return Comparison(DIGITS, [*overrides, *more], ["mixup"], 1, ClusterSettings())

    assert [config.run.dir.name for config in comparison("train.epochs=4").missing] == ["mixup-0"]
    for more, words in (
        (("train.epochs=1",), "has ended with train.epochs=2"),
        (("train.epochs=4", "optim.lr=7"), "optim.lr"),
        (("train.epochs=4", "data.label_set=clean"), "data.label_set"),
    ):
        with pytest.raises(UserError, match=words):
            comparison(*more)


def test_a_comparison_does_not_take_over_a_run(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {}")
    with pytest.raises(UserError, match="is a run itself"):
        Comparison(DIGITS, [f"data.root={digits}", f"run.dir={tmp_path}"], ["mixup"], 1, ClusterSettings())


def test_a_run_that_fails_does_not_keep_the_others_from_running(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Comparison(DIGITS, [f"data.root={digits}", f"run.dir={tmp_path}"], ["mixup", "elr"], 1, ClusterSettings())
    begun: list[str] = []
    codes = {"mixup-0": 1, "elr-0": 0}

    def run_here(self: Comparison, config: Config, cluster: str) -> int:
        begun.append(config.run.dir.name)
        return codes[begun[-1]]

    monkeypatch.setattr(Comparison, "_run_here", run_here)
    assert study.run("local", NullTracker()) == 1
    assert begun == ["mixup-0", "elr-0"]
    codes["mixup-0"] = 143  # stopped: so is the comparison
    begun.clear()
    assert study.run("local", NullTracker()) == 143
    assert begun == ["mixup-0"]


def finished(name: str, last: float, **settings: Any) -> Finished:
    summary = {
        **{"stage": "train", "method": name, "seed": settings.pop("seed", 0), "world_size": 2, "split": None},
        **{"accuracy": {"best": last + 1, "last": last}, "seconds": 60.0, "images_per_second": 1234.5},
    }
    return Finished(Path(f"runs/{name}"), summary, {"method.name": name, **settings})


def test_runs_are_grouped_by_all_that_decides_but_the_seed() -> None:
    runs = [
        *(
            finished("dividemix", score, seed=seed, **{"optim.lr": 0.1})
            for seed, score in enumerate((90.0, 91.0, 95.0))
        ),
        finished("dividemix", 80.0, **{"optim.lr": 0.2}),
        finished("mixup", 70.0, **{"optim.lr": 0.3}),
    ]
    for run, auc in zip(runs, (0.97, 0.98, 0.99), strict=False):
        run.summary["split"] = {"auc": auc}
    groups = grouped(runs)
    assert [group.name for group in groups] == ["dividemix optim.lr=0.1", "dividemix optim.lr=0.2", "mixup"]
    values = row(groups[0])
    assert (values["last"], values["last_deviation"]) == (92.0, pytest.approx(7**0.5))
    text = as_text([row(group) for group in groups]).splitlines()
    shown = ["optim.lr=0.1", "3", "93.00", "±", "2.65", "92.00", "±", "2.65", "0.980", "60", "1,234", "2"]
    assert text[1].split()[1:] == shown
    assert text[3].split() == ["mixup", "1", "71.00", "70.00", "-", "60", "1,234", "2"]
    assert len({len(line) for line in text}) == 1
    for run, accuracy in zip(runs, (80.0, 82.0), strict=False):
        run.summary["test"] = {"split": "test", "chosen": {"accuracy": accuracy}}
    with_test = as_text([row(group) for group in groups]).splitlines()
    assert with_test[0].split()[4:9] == ["last", "%", "test", "%", "split"]
    assert with_test[1].split()[9:13] == ["81.00", "±", "1.41", "0.980"]
    assert with_test[3].split() == ["mixup", "1", "71.00", "70.00", "-", "-", "60", "1,234", "2"]


def test_a_bar_in_a_name_is_no_column() -> None:
    (line,) = as_markdown([row(Group("a|b", [finished("a|b", 50.0)]))]).splitlines()[2:]
    assert line.startswith(r"| a\|b | 1 |")


def test_a_directory_of_runs_stands_for_them_and_old_runs_stand_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "a"):
        folder = tmp_path / name
        folder.mkdir()
        summary = finished("elr", 50.0).summary | {"data_set": "digits"}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "config.yaml").write_text("run: {of: another release}")
    assert [str(run.settings["run"]) for run in (read(tmp_path / "a"), read(tmp_path / "b"))] == [
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    ]
    assert main(["compare", str(tmp_path), str(tmp_path / "a")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0:2] for line in table[1:]] == [["elr", f"{tmp_path}/a"], ["elr", f"{tmp_path}/b"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods=elr,elr",), "give each method once"),
        (("--methods=elr", "--seeds=0"), "--seeds 0"),
        (("--methods=elr,coteaching",), "method.name"),
        (("--methods=elr", "run.seed=3"), "run.seed is what a comparison varies"),
        (("--nodes=2",), "--nodes is for runs that --methods starts"),
        (("--seeds=2",), "--seeds is for runs that --methods starts"),
        ((), "is a configuration: say which --methods to run"),
        (("--methods=elr", "--nodes=2"), "has one node"),
        (("--methods=elr", "data.root=nowhere"), "nowhere"),
    ],
)
def test_a_wrong_comparison_is_one_clear_line(
    arguments: tuple[str, ...], words: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"data.root={digits}", f"run.dir={tmp_path / 'study'}", "train.epochs=2", *arguments]
    cluster = ["--cluster=local"] if any(word.startswith("--methods") for word in arguments) else []
    assert main(["compare", str(DIGITS), *given, *cluster]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert words in told
    assert not (tmp_path / "study").exists()


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has not ended"):
        read(tmp_path)
