"""The record of a run in JSON lines: each record once, none lost, whatever killed the run and however it goes on."""

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nldist.errors import UserError
from nldist.track.tracker import NullTracker, Tracker, flatten
from tests.jobs import run_job
from tests.mlflow_server import records

PARAMS = {"method": {"name": "dividemix", "lambda_u": 25.0, "views": [{"crop": 32}]}, "seed": None, "world_size": 2}


def make_tracker(run_dir: Path, **changes: Any) -> Tracker:
    return Tracker(run_dir, uri=None, experiment="tests", run_name=run_dir.name, params=PARAMS | changes)


def test_lines_hold_every_value_in_strict_json(tmp_path: Path) -> None:
    tracker = make_tracker(tmp_path)
    tracker.log({"loss": np.float32(0.5), "note": "a", "auc": None, "n": 3}, epoch=1, step=7)
    tracker.log({"a": math.nan, "b": math.inf, "c": -math.inf}, epoch=1, step=8)
    tracker.end("FINISHED")
    tracker.end("FINISHED")
    first, second = records(tmp_path)
    assert abs(first.pop("time") - time.time()) < 600
    head = {"kind": "step", "epoch": 1, "step": 7, "world_size": 2}
    assert first == {**head, "loss": 0.5, "note": "a", "auc": None, "n": 3}
    assert (second["a"], second["b"], second["c"]) == ("NaN", "Infinity", "-Infinity")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    assert tracker.mlflow_run_id is None
    assert tracker.open_command is None


def test_a_resumed_run_writes_no_record_twice(tmp_path: Path) -> None:
    def steps(tracker: Tracker, first: int, last: int) -> None:
        for step in range(first, last):
            tracker.log({"loss": float(step)}, epoch=step // 4, step=step)
            if step % 4 == 3:
                tracker.log({"accuracy": step / 10}, epoch=step // 4, step=step, kind="epoch")

    whole, resumed = make_tracker(tmp_path / "whole"), make_tracker(tmp_path / "resumed")
    steps(whole, 0, 12)
    steps(resumed, 0, 8)
    with (tmp_path / "resumed/metrics.jsonl").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 5)  # killed inside the last write: the epoch's record at step 7
    steps(make_tracker(tmp_path / "resumed"), 4, 12)

    def content(name: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k != "time"} for record in records(tmp_path / name)]

    assert content("resumed") == content("whole")
    assert len(content("whole")) == 15


@pytest.mark.parametrize("torn", [b"", b'{"a": 1', b"x" * 200_000])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"time": 1.0, "kind": "step", "epoch": 0, "step": 0, "x": 1}\n'
    for start in (whole, b""):
        path.write_bytes(start + torn)
        make_tracker(tmp_path).end("FINISHED")
        assert path.read_bytes() == start


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\0\0\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: the line at byte 0"):
        make_tracker(tmp_path)


def test_values_cannot_take_the_names_of_the_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'epoch'"):
        make_tracker(tmp_path).log({"epoch": 1.0}, epoch=0, step=0)


def test_the_null_tracker_has_the_same_interface_and_does_nothing(tmp_path: Path) -> None:
    tracker: Tracker = NullTracker()
    tracker.log({"loss": 1.0}, epoch=0, step=0)
    tracker.artifact(tmp_path / "none")
    tracker.set_tags({"a": 1})
    tracker.end("FAILED", timeout_seconds=1)
    assert (tracker.mlflow_run_id, tracker.open_command) == (None, None)
    public = {name for name in vars(Tracker) if not name.startswith("_")}
    assert public - {"open_command"} <= vars(NullTracker).keys()


def test_flatten_gives_dotted_names() -> None:
    assert dict(flatten({**PARAMS, "empty": {}, "flag": True})) == {
        "method.name": "dividemix",
        "method.lambda_u": "25.0",
        "method.views": '[{"crop": 32}]',
        "seed": "null",
        "world_size": "2",
        "empty": "{}",
        "flag": "true",
    }


def test_on_another_number_of_ranks_nothing_is_a_replay(tmp_path: Path) -> None:
    """Two ranks reach step 30 and go back to 20, the end of epoch 1; one rank goes on, and is itself killed twice."""

    def log(world_size: int, steps: range, epoch: int) -> None:
        tracker = make_tracker(tmp_path, world_size=world_size)
        for step in steps:
            tracker.log({"loss": step + world_size / 10}, epoch=epoch, step=step)

    log(2, range(1, 21), 1)
    log(2, range(21, 31), 2)
    log(1, range(21, 26), 2)
    log(1, range(21, 36), 2)  # killed and again from 20: five replays
    log(2, range(61, 64), 3)  # beyond the last one on record: the axis keeps what it was moved by
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == [*range(1, 46), *range(71, 74)]
    assert [line["loss"] for line in lines[:30]] == [step + 0.2 for step in range(1, 31)]
    assert [line["loss"] for line in lines[30:45]] == [step + 0.1 for step in range(21, 36)]
    assert [line.get("moved", 0) for line in lines] == [0] * 30 + [10] * 18
    assert [line["world_size"] for line in lines] == [2] * 30 + [1] * 15 + [2] * 3


def test_steps_move_no_further_than_they_must(tmp_path: Path) -> None:
    make_tracker(tmp_path, world_size=2).log({"loss": 1.0}, epoch=2, step=30)
    make_tracker(tmp_path, world_size=1).log({"loss": 2.0}, epoch=2, step=35)
    assert [line["step"] for line in records(tmp_path)] == [30, 35]


def test_an_epoch_keeps_its_number_on_another_number_of_ranks(tmp_path: Path) -> None:
    """Killed between the record of epoch 3 and its checkpoint: the run's epoch 3 is the one on one rank."""
    for world_size, epochs in ((2, (1, 2, 3)), (1, (3,)), (1, (3, 4))):
        tracker = make_tracker(tmp_path, world_size=world_size)
        for epoch in epochs:
            tracker.log({"accuracy": epoch + world_size / 10}, epoch=epoch, step=epoch, kind="epoch")
    assert [(line["step"], line["accuracy"]) for line in records(tmp_path)] == [
        *[(1, 1.2), (2, 2.2), (3, 3.2)],
        *[(3, 3.1), (4, 4.1)],
    ]


def test_the_record_of_a_release_before_goes_on(tmp_path: Path) -> None:
    line = '{"time": 1.0, "kind": "step", "epoch": 1, "step": 7, "loss": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(line)
    tracker = make_tracker(tmp_path)
    for step in (6, 7, 8):
        tracker.log({"loss": 1}, epoch=1, step=step)
    assert [record["step"] for record in records(tmp_path)] == [7, 8]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_a_run_that_is_killed_within_an_epoch_loses_no_record(
    before: int, after: int, digits: Path, tmp_path: Path
) -> None:
    run_dir, per_epoch = tmp_path / "run", {1: 23, 2: 12}  # steps of 64 of 1,437 images a rank
    settings = [f"data.root={digits}", "method.name=cross_entropy", "train.epochs=3", "train.eval_batch_size=512"]
    settings += ["train.checkpoint_every_steps=0", "track.every_seconds=1e-9", "optim.schedule=step"]
    first_done = per_epoch[before] + 1 + 7  # an epoch, its evaluation, and seven steps more
    assert run_job(run_dir, *settings, world_size=before, kill=(0, first_done))[0] == -9
    assert run_job(run_dir, *settings, world_size=after, kill=(0, 9))[0] == -9
    assert run_job(run_dir, *settings, world_size=after) == [0] * after
    lines = records(run_dir)
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    edge, end = per_epoch[before], per_epoch[before] + 2 * per_epoch[after]
    own = [(line["world_size"], line["step"] - line.get("moved", 0)) for line in steps]
    left_behind = [(before, step) for step in range(edge + 1, edge + 8)] if before != after else []
    assert own == [
        *[(before, step) for step in range(1, edge + 1)],
        *left_behind,
        *[(after, step) for step in range(edge + 1, end + 1)],
    ]
    assert [line["step"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3]
