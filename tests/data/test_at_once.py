"""Two commands on one data set at once: both end well, or one is refused."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nldist.cli import main
from nldist.data.make.build import Build
from nldist.data.make.lock import locked
from nldist.errors import UserError
from tests.commands import Command
from tests.data.command import label_names, nldist, shard, shard_well, write_table
from tests.ranks import CONTEXT


def _hold(path: Path, held: Path, release: Path, shared: bool = False) -> None:
    with locked(path, shared=shared):
        held.touch()
        while not release.exists():
            time.sleep(0.005)


@contextmanager
def holding(path: Path, folder: Path, *, shared: bool = False) -> Iterator[Path]:
    """Another process holds the lock until the file that is given is there."""
    held, release = folder / "held", folder / "release"
    process = CONTEXT.Process(target=_hold, args=(path, held, release, shared))
    process.start()
    try:
        while not held.exists():
            time.sleep(0.005)
        yield release
    finally:
        release.touch()
        process.join()


def start(folder: Path, *words: object) -> Command:
    return Command(main, [str(word) for word in ("shard", *words, "--workers", 0)], folder, os.environ)


def test_two_splits_at_once_are_both_in_the_data_set(tmp_path: Path) -> None:
    out, splits = tmp_path / "out", [f"part{number}" for number in range(4)]
    tables = [write_table(tmp_path / split / "t.csv", ["a", "nan" if split == "part2" else "b"]) for split in splits]
    shard_well("csv", write_table(tmp_path / "t.csv", ["a", "b"]), out)
    with holding(out / ".dataset.lock", tmp_path) as release:
        commands = [
            start(tmp_path / f"run-{split}", "csv", table, out, "--split", split)
            for split, table in zip(splits, tables, strict=True)
        ]
        until = time.monotonic() + 60
        while len(list(out.glob("part*/.build/*.parquet"))) < 3:  # then all are about to end
            assert time.monotonic() < until
            time.sleep(0.01)
        release.touch()
        done = [command.wait(60) for command in commands]
    assert [ended.returncode for ended in done] == [0, 0, 2, 0], done
    assert sorted(json.loads((out / "dataset.json").read_text())["splits"]) == ["part0", "part1", "part3", "train"]
    assert label_names(out, "part3") == {"0": "a", "1": "b"}
    assert not list(out.rglob("*.lock"))


def test_the_same_split_twice_at_once_is_refused(tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "t.csv", ["a", "b"]), tmp_path / "out"
    with holding(out / ".train.lock", tmp_path):
        assert "out/train is being written by another command: wait" in shard("csv", table, out).error
        shard_well("csv", table, out, split="test")
    shard_well("csv", table, out)
    assert sorted(json.loads((out / "dataset.json").read_text())["splits"]) == ["test", "train"]


def test_jobs_of_an_array_share_a_split_and_nobody_else_writes_it_meanwhile(tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "t.csv", ["a", "b"]), tmp_path / "out"
    build = Build(out, "train")
    with holding(out / ".train.lock", tmp_path, shared=True):
        with build.claimed(shared=True):
            pass
        assert "out/train is being written by another command: wait" in shard("csv", table, out).error
    (again := tmp_path / "again").mkdir()
    with (
        holding(out / ".train.lock", again),
        pytest.raises(UserError, match="being written by another command"),
        build.claimed(shared=True),
    ):
        pass
    shard_well("csv", table, out)
    assert not list(out.rglob("*.lock"))


def test_what_a_killed_command_held_is_free(tmp_path: Path) -> None:
    table, out = write_table(tmp_path / "t.csv", ["a", "b"]), tmp_path / "out"
    process = CONTEXT.Process(target=_hold, args=(out / ".train.lock", tmp_path / "held", tmp_path / "release"))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert (out / ".train.lock").exists()
    shard_well("csv", table, out)
    assert not list(out.rglob("*.lock"))


def test_a_complete_split_of_a_read_only_data_set_needs_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, out = write_table(tmp_path / "t.csv", ["a", "b"]), tmp_path / "out"
    shard_well("csv", table, out)

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("nldist.data.make.lock._taken", fail)
    assert "already complete" in shard_well("csv", table, out)
    assert "cannot lock" in shard("csv", table, out, split="test").error


def test_one_name_for_two_label_sets_at_once(tmp_path: Path) -> None:
    """The second to come sees that the first one's labels are others."""
    table, out = write_table(tmp_path / "t.csv", ["a", "b"]), tmp_path / "out"
    shard_well("csv", table, out)
    lists = [tmp_path / f"{number}.csv" for number in range(2)]
    for number, path in enumerate(lists):
        path.write_text("path,label\n0.png,a\n" + f"1.png,{'ab'[number]}\n")
    with holding(out / ".dataset.lock", tmp_path) as release:
        commands = [
            Command(main, ["noise", str(out), "--csv", str(path), "--name", "l"], tmp_path / path.stem, os.environ)
            for path in lists
        ]
        time.sleep(0.3)
        release.touch()
        done = [command.wait(60) for command in commands]
    assert sorted(str(ended.returncode) for ended in done) == ["0", "2"]
    assert "choose another name" in "".join(ended.stderr for ended in done)
    assert nldist("verify", out, "--workers", 0).code == 0
