import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import nldist.cli
from nldist.dist.checksums import CHECKSUMS_FILE
from nldist.models import build_model
from nldist.run.directory import RunDirectory
from tests.commands import Command
from tests.conftest import run_tool
from tests.jobs import output, run_job
from tests.ranks import CONTEXT, free_port

# A warm-up epoch and two of DivideMix, with checkpoints so frequent that a kill falls between any two of them.
SHORT = (
    *("train.epochs=3", "method.dividemix.warmup_epochs=1"),
    *("train.batch_size=32", "train.checkpoint_every_steps=3"),
)


def weights(run_dir: Path) -> list[dict[str, torch.Tensor]]:
    networks: list[dict[str, torch.Tensor]] = torch.load(run_dir / "weights" / "last.pt", weights_only=True)["networks"]
    return networks


def assert_same_weights(one: Path, other: Path) -> None:
    for network, same in zip(weights(one), weights(other), strict=True):
        for name, value in network.items():
            assert torch.equal(value, same[name]), f"{name} differs"


@pytest.fixture(scope="module")
def undisturbed(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_job(run_dir, f"data.root={few_digits}", *SHORT, world_size=2) == [0, 0]
    return run_dir


@pytest.mark.parametrize("num_kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_steps_ends_with_the_same_weights(
    num_kills: int, undisturbed: Path, few_digits: Path, tmp_path: Path
) -> None:
    random.seed(7)
    run_dir = tmp_path / "run"
    for _ in range(num_kills):
        victim = random.randrange(2)
        codes = run_job(run_dir, f"data.root={few_digits}", *SHORT, world_size=2, kill=(victim, random.randint(1, 17)))
        assert codes[victim] == -9
        assert codes[1 - victim] == 1, "the other rank must end, not wait"
    assert run_job(run_dir, f"data.root={few_digits}", *SHORT, world_size=2) == [0, 0]
    assert output(run_dir).count("resumed from") >= num_kills - 1
    assert_same_weights(undisturbed, run_dir)
    assert epoch_records(run_dir) == epoch_records(undisturbed)


def epoch_records(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "images_per_second", "data_wait_share", "sent_mib")  # measured since the last start
    return [
        {name: value for name, value in record.items() if not name.endswith(timed)}
        for record in records
        if record["kind"] == "epoch"
    ]


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (3, ("method.dividemix.peers=sequential", "data.num_workers=1", "method.mixture.history=3")),
        (1, ("optim.accumulate=3", "train.ema_decay=0.9", "method.dividemix.form=real", "method.dividemix.subset=200")),
    ],
)
def test_resume_is_exact_with_every_kind_of_state(
    world_size: int, options: tuple[str, ...], few_digits: Path, tmp_path: Path
) -> None:
    arguments = (f"data.root={few_digits}", *SHORT, *options)
    assert run_job(tmp_path / "whole", *arguments, world_size=world_size) == [0] * world_size
    steps = (8, 10, 5) if world_size == 3 else (20, 17, 8)
    for step in steps:
        assert run_job(tmp_path / "cut", *arguments, world_size=world_size, kill=(world_size - 1, step))[-1] == -9
    assert run_job(tmp_path / "cut", *arguments, world_size=world_size) == [0] * world_size
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def as_of_the_release_before(file: Path) -> None:
    """Take what nldist 0.1 did not write out of a checkpoint's or weights file, and from beside it."""
    (file.parent / CHECKSUMS_FILE).unlink(missing_ok=True)
    content = torch.load(file, weights_only=True)
    torch.save({key: value for key, value in content.items() if key not in ("model_revision", "nldist")}, file)


@pytest.fixture
def old_run(few_digits: Path, tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """A run of nldist 0.1 with a model, killed in its second epoch or finished; and its settings."""

    def make(model: str, *, finished: bool) -> tuple[Path, list[str]]:
        run_dir = tmp_path / "run"
        arguments = [
            f"data.root={few_digits}",
            f"model.name={model}",
            "method.name=cross_entropy",
            "train.batch_size=80",
        ]
        arguments += ["train.checkpoint_every_steps=5", "train.epochs=2", "optim.schedule=step"]
        assert run_job(run_dir, *arguments, kill=None if finished else (0, 14)) == [0 if finished else -9]
        for file in (*run_dir.glob("checkpoints/*/shared.pt"), run_dir / "weights" / "last.pt"):
            as_of_the_release_before(file)
        return run_dir, arguments

    return make


OTHER_NETWORK = "is of another preact_resnet18: since nldist 0.2 its identity shortcuts carry relu(bn1(x))"


def hold(run_dir: Path, told: Connection) -> None:
    run = RunDirectory(run_dir)
    run.claim(None)
    told.send("held")
    told.recv()


def test_a_run_that_has_died_is_told_from_one_that_runs(
    few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = (f"data.root={few_digits}", "method.name=cross_entropy", "train.epochs=2")
    assert run_job(run_dir, *arguments, kill=(0, 5)) == [-9]
    nldist.cli.main(["status", str(run_dir)])
    assert "state     died: no process has the run directory any more" in capsys.readouterr().out
    here, there = CONTEXT.Pipe()
    holder = CONTEXT.Process(target=hold, args=(run_dir, there))
    holder.start()
    assert here.recv() == "held"
    nldist.cli.main(["status", str(run_dir)])
    assert "state     running" in capsys.readouterr().out
    here.send("end")
    holder.join()
    assert run_job(run_dir, *arguments) == [0]
    nldist.cli.main(["status", str(run_dir)])
    assert "state     done" in capsys.readouterr().out


def noise_on_a_rank(rank: int, port: int, arguments: list[str], log: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    stream = log.open("w")
    os.dup2(stream.fileno(), 1)
    sys.exit(nldist.cli.main(["noise", *arguments]))


def test_semantic_noise_is_the_same_from_two_ranks(undisturbed: Path, few_digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "digits"
    shutil.copytree(few_digits, data)
    arguments = [str(data), "--model", "semantic", "--run", str(undisturbed), "--name"]
    port, logs = free_port(), [tmp_path / f"{rank}.log" for rank in (0, 1)]
    ranks = [
        CONTEXT.Process(target=noise_on_a_rank, args=(rank, port, [*arguments, "two"], log))
        for rank, log in enumerate(logs)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    run_tool("tools/noise.py", *arguments, "one")
    one, two = (pq.read_table(data / "train" / "labels" / f"{name}.parquet") for name in ("one", "two"))
    assert one == two
    assert "two:" in logs[0].read_text()
    assert "two:" not in logs[1].read_text(), "rank 0 alone speaks"


def test_a_run_of_the_release_before_goes_on(old_run: Callable[..., tuple[Path, list[str]]]) -> None:
    run_dir, arguments = old_run("small_cnn", finished=False)
    assert run_job(run_dir, *arguments) == [0]
    assert "saved by nldist 0.1.0, goes on with" in output(run_dir)


def test_a_run_whose_network_was_another_is_refused(
    old_run: Callable[..., tuple[Path, list[str]]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, arguments = old_run("preact_resnet18", finished=False)
    assert run_job(run_dir, *arguments) == [2]
    assert f"{run_dir} {OTHER_NETWORK}" in output(run_dir)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert nldist.cli.main(["evaluate", str(run_dir)]) == 2
    assert f"last.pt {OTHER_NETWORK}" in capsys.readouterr().err


def test_a_finished_run_of_another_network_is_left_as_it_is(old_run: Callable[..., tuple[Path, list[str]]]) -> None:
    run_dir, arguments = old_run("preact_resnet18", finished=True)
    assert run_job(run_dir, *arguments) == [0]
    assert "nothing to do" in output(run_dir)
    assert run_job(run_dir, *arguments, "train.epochs=3") == [2]
    assert OTHER_NETWORK in output(run_dir)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sigterm_saves_and_the_same_command_goes_on(
    num_workers: int, undisturbed: Path, few_digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = (f"data.root={few_digits}", *SHORT, "train.checkpoint_every_steps=0", f"data.num_workers={num_workers}")
    assert run_job(run_dir, *arguments, world_size=2, stop=(1, 24)) == [143, 143]
    assert "stopped at e0001" in output(run_dir)
    assert run_job(run_dir, *arguments, world_size=2) == [0, 0]
    assert_same_weights(undisturbed, run_dir)


@pytest.mark.parametrize("world_size", [1, 3])
def test_another_world_size_goes_on_from_the_last_whole_epoch(
    world_size: int, few_digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = (f"data.root={few_digits}", *SHORT)
    assert run_job(run_dir, *arguments, world_size=2, kill=(0, 27))[0] == -9
    assert run_job(run_dir, *arguments, world_size=world_size) == [0] * world_size
    assert "resumed from e0001-p00-s000000000" in output(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["epochs"], summary["world_size"]) == (3, world_size)


def test_another_world_size_in_the_first_epoch_starts_again_and_keeps_its_own_checkpoints(
    few_digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = (f"data.root={few_digits}", *SHORT)
    assert run_job(run_dir, *arguments, world_size=2, kill=(0, 9))[0] == -9
    assert run_job(run_dir, *arguments, kill=(0, 8)) == [-9]
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == [
        "e0000-p00-s000000003",
        "e0000-p00-s000000006",
    ]


def test_a_run_does_not_go_on_with_other_data(few_digits: Path, tmp_path: Path) -> None:
    run_dir, other = tmp_path / "run", tmp_path / "digits"
    shutil.copytree(few_digits, other)
    assert run_job(run_dir, f"data.root={few_digits}", *SHORT, kill=(0, 20)) == [-9]
    assert run_job(run_dir, f"data.root={other}", *SHORT, kill=(0, 3)) == [-9], "a copy is the same data"
    (other / "train" / "labels" / "sym50.parquet").unlink()
    run_tool("tools/noise.py", other, "--model", "symmetric", "--rate", 0.5, "--seed", 1, "--name", "sym50")
    assert run_job(run_dir, f"data.root={other}", *SHORT) == [2]
    assert "a run on other samples or labels" in output(run_dir)


def test_a_run_on_subsets_judges_every_label_at_the_end(few_digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={few_digits}", "train.epochs=2", "method.dividemix.warmup_epochs=1")
    assert run_job(tmp_path / "run", *arguments, "method.dividemix.subset=130") == [0]
    samples = pq.read_table(tmp_path / "run" / "tables" / "samples.parquet").to_pydict()
    assert None not in samples["clean_probability"] + samples["suggested"]
    assert (tmp_path / "run" / "plots" / "losses-net-end.png").exists()


def test_a_start_that_was_refused_leaves_no_settings_behind(few_digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={few_digits}", *SHORT)
    assert run_job(tmp_path / "run", *arguments, "data.label_set=sym99") == [2]
    assert run_job(tmp_path / "run", *arguments, kill=(0, 3)) == [-9]


def test_a_run_leaves_what_scripts_and_people_read(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = (f"data.root={digits}", "train.epochs=3", "method.dividemix.warmup_epochs=1")
    assert run_job(run_dir, *settings, world_size=2) == [0, 0]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["method"] == "dividemix"
    assert summary["label_set"] == "sym50"
    assert summary["world_size"] == 2
    accuracies = [record["accuracy"] for record in epoch_records(run_dir)]
    assert summary["accuracy"] == {
        "best": max(accuracies),
        "last": pytest.approx(np.mean(accuracies)),
        "final": accuracies[-1],
    }
    assert summary["split"]["auc"] > 0.7
    assert summary["images_per_second"] > 0
    samples = pq.read_table(run_dir / "tables" / "samples.parquet").to_pydict()
    assert samples["id"] == list(range(1437))
    wrong = np.mean(np.array(samples["clean_probability"]) < 0.5)
    assert 0.3 < wrong < 0.7
    assert (run_dir / "plots" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_rank_that_fails_ends_the_run_with_its_own_error(few_digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    codes = run_job(run_dir, f"data.root={few_digits}", *SHORT, "optim.lr=1e6", "optim.schedule=step", world_size=2)
    assert 0 not in codes
    logs = output(run_dir, 0) + output(run_dir, 1)
    assert "lower optim.lr" in logs
    assert "Traceback" not in logs


def test_other_settings_in_the_same_directory_are_refused(undisturbed: Path, few_digits: Path) -> None:
    assert run_job(undisturbed, f"data.root={few_digits}", *SHORT, "optim.lr=0.5", world_size=2)[0] == 2
    assert "optim.lr (0.02 -> 0.5)" in output(undisturbed)


def test_a_finished_run_is_not_trained_again(undisturbed: Path, few_digits: Path) -> None:
    before = (undisturbed / "weights" / "last.pt").read_bytes()
    assert run_job(undisturbed, f"data.root={few_digits}", *SHORT, world_size=2) == [0, 0]
    assert "nothing to do" in output(undisturbed)
    assert (undisturbed / "weights" / "last.pt").read_bytes() == before


def test_semantic_noise_is_what_the_run_predicts(undisturbed: Path, few_digits: Path, tmp_path: Path) -> None:
    """Against a plain loop over the shards, with a stock webdataset reader (our own reference)."""
    import webdataset

    from nldist.data.index import Index

    data = tmp_path / "digits"
    shutil.copytree(few_digits, data)
    told = run_tool("tools/noise.py", data, "--model", "semantic", "--run", undisturbed, "--name", "semantic").stdout
    networks = []
    for state in weights(undisturbed):
        networks.append(build_model("small_cnn", 10))
        networks[-1].load_state_dict(state)
        networks[-1].eval()
    index = Index.open(data, "train")
    predicted = []
    for image, _ in webdataset.WebDataset(index.shards, shardshuffle=False).decode("torchrgb8").to_tuple("png", "cls"):
        with torch.no_grad():
            logits = sum(network.logits((image[None] / 255 - 0.305) / 0.376) for network in networks)
        predicted.append(int(logits.argmax()))  # type: ignore[union-attr]
    labels = index.labels("semantic")
    assert (labels == predicted).mean() > 0.999
    wrong = int((labels != index.labels("clean")).sum())
    assert 0 < wrong < 479
    assert f"semantic: {wrong} of 479 labels" in told


@pytest.mark.parametrize("method", ["cross_entropy", "mixup"])
def test_the_other_methods_learn(method: str, digits: Path, tmp_path: Path) -> None:
    arguments = (f"data.root={digits}", "data.label_set=clean", f"method.name={method}", "train.epochs=4")
    assert run_job(tmp_path / "run", *arguments) == [0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["method"] == method
    assert summary["accuracy"]["final"] > 90
    assert summary["split"]["auc"] is None, "no label is wrong"
    assert summary["split"]["labelled_share"] > 0.5


def test_evaluate_and_mlflow(few_digits: Path, tmp_path: Path) -> None:
    """With the sqlite store."""
    run_dir = tmp_path / "run"
    settings = (
        f"data.root={few_digits}",
        "train.epochs=2",
        "method.dividemix.warmup_epochs=1",
        "track.histogram_every=1",
    )
    assert run_job(run_dir, *settings, "track.enabled=true", world_size=2) == [0, 0]
    done = Command(nldist.cli.main, ["evaluate", run_dir], tmp_path, os.environ).wait()
    assert done.returncode == 0, done.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    evaluation = json.loads(done.stdout)
    assert evaluation["accuracy"] == pytest.approx(summary["accuracy"]["final"], abs=0.3)
    assert evaluation["num_evaluated"] == 120

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "nldist"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.02"
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [point.value for point in history] == [record["accuracy"] for record in epoch_records(run_dir)]
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "plots")]
    assert "plots/losses-net0-epoch0002.png" in pictures
    assert client.list_artifacts(run.info.run_id, "plots")
