"""Runs and data sets that are not as, or where, they were."""

import errno
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from nldist.cli import main
from tests.conftest import run_tool
from tests.jobs import DIGITS, run_job


@pytest.fixture
def sealed(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits' data set in which no file can be made, and that no index file was written for yet."""
    copy = tmp_path / "digits"
    shutil.copytree(digits, copy)
    for file in copy.rglob(".index-*"):
        file.unlink()
    return copy


def test_label_sets_of_a_read_only_data_set_lie_elsewhere(
    sealed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not stop root: the attempt to make a file there is what fails."""
    make_temporary = tempfile.TemporaryFile

    def refuse(dir: Path) -> Any:
        if sealed in (dir, *dir.parents):
            raise OSError(errno.EROFS, "Read-only file system")
        return make_temporary(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    noise = ["noise", str(sealed), "--model", "symmetric", "--rate", "0.3", "--name"]
    assert main([*noise, "sym30"]) == 2
    assert "(noise: --labels-dir)" in capsys.readouterr().err
    before = sorted(sealed.rglob("*"))
    assert main([*noise, "sym30", "--labels-dir", str(tmp_path / "labels")]) == 0
    assert main([*noise, "sym50", "--labels-dir", str(tmp_path / "labels")]) == 2
    assert "has a label set 'sym50' of its own" in capsys.readouterr().err
    assert sorted(sealed.rglob("*")) == before
    settings = [str(DIGITS), f"data.root={sealed}", "data.label_set=sym30", f"data.cache_dir={tmp_path / 'cache'}"]
    assert main(["dry-run", *settings, f"data.labels_dir={tmp_path / 'labels'}"]) == 0
    assert "27." in capsys.readouterr().out, "0.3 of the labels drawn from ten classes"
    assert main(["dry-run", *settings]) == 2
    assert "no label set 'sym30'; there are: clean, sym50" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("moved")
    shutil.copytree(digits, root / "data")
    settings = ["data.label_set=null", "method.name=cross_entropy", "train.epochs=1"]
    assert run_job(root / "run", f"data.root={root / 'data'}", *settings) == [0]
    return root


def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["summary.json", "status.json"])
@pytest.mark.parametrize("content", ["", '{"stage": "tr', "[]"])
def test_a_damaged_file_of_a_run_is_named(
    name: str, content: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, tmp_path)
    (run / name).write_text(content)
    assert main(["compare" if name == "summary.json" else "status", str(run)]) == 2
    told = capsys.readouterr().err
    assert f"{run / name} is damaged" in told
    assert told.count("\n") == 1


def test_a_run_without_its_settings_or_weights_is_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, tmp_path)
    weights = run / "weights" / "last.pt"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["evaluate", str(run), "dist.device=cpu"]) == 2
    assert f"{weights} cannot be read, it may be damaged" in capsys.readouterr().err
    (run / "config.yaml").write_text("")
    assert main(["evaluate", str(run)]) == 2
    assert f"{run / 'config.yaml'} must hold sections" in capsys.readouterr().err


def test_a_run_whose_data_has_moved_says_how_to_go_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(finished, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(finished / "data", elsewhere)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(finished / "data"), "/nowhere/data"))
    assert main(["evaluate", str(run), "dist.device=cpu"]) == 2
    assert "the run's data set is not in /nowhere/data; if it has moved, add data.root=" in capsys.readouterr().err
    run_tool("-m", "nldist.cli", "evaluate", run, "dist.device=cpu", f"data.root={elsewhere}")
    assert json.loads((run / "evaluation-test-last.json").read_text())["num_evaluated"] == 360
