"""What the batch script decides, with a command in the place of scontrol. tests/slurm has the real one."""

import os
from pathlib import Path

import pytest

from nldist.errors import REFUSAL_VARIABLE, UserError, main_guard
from nldist.launch.requeue import main, refusal


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with what scontrol was told; it shows what `shown` holds."""
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/told\ncat {tmp_path}/shown\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "100")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "told"


def decide(
    told: Path,
    code: int,
    state: str = "RUNNING",
    reason: str = "None",
    restarts: int = 0,
    max_crashes: int = 3,
    run_time: str = "00:10:00",
) -> bool:
    """Whether the job was requeued."""
    facts = {"JobId": 100, "JobState": state, "Reason": reason, "Restarts": restarts, "RunTime": run_time}
    told.with_name("shown").write_text(" ".join(f"{name}={value}" for name, value in facts.items()) + "\n")
    told.write_text("")
    assert main(code, told.parent, max_crashes) == code
    return any(line.startswith("requeue") for line in told.read_text().splitlines())


@pytest.mark.parametrize(
    ("code", "state", "reason", "restarts", "again"),
    [
        (0, "RUNNING", "None", 0, False),
        (2, "RUNNING", "None", 0, False),  # for the user to put right
        (144, "RUNNING", "None", 0, True),  # near the time limit, or preempted
        (137, "RUNNING", "None", 0, True),  # a rank was killed
        (143, "RUNNING", "None", 0, True),  # a rank died and SIGTERM ended the others
        (144, "COMPLETING", "None", 0, False),  # scancel
        (144, "COMPLETING", "TimeLimit", 0, True),
        (144, "COMPLETING", "None", 1, False),  # Slurm has requeued it
        (144, "COMPLETING", "TimeLimit", 1, False),
    ],
)
def test_who_is_started_again(code: int, state: str, reason: str, restarts: int, again: bool, told: Path) -> None:
    assert decide(told, code, state, reason, restarts) == again


def test_crashes_are_counted_until_a_run_stops_with_all_saved(told: Path) -> None:
    codes = (137, 140, 144, 137, 137, 1)
    assert [decide(told, code, max_crashes=2) for code in codes] == [True] * 5 + [False]
    crashes = told.with_name("100.crashes")
    assert crashes.read_text() == "137\n137\n1\n"
    assert not decide(told, 1, max_crashes=2, run_time="01:00:00")
    assert decide(told, 1, max_crashes=2, run_time="1-00:00:01"), "this start went well for long"
    assert crashes.read_text() == "1\n"


def test_a_time_limit_that_comes_before_the_ranks_listen_is_not_tried_for_ever(told: Path) -> None:
    tries = [decide(told, 1, "COMPLETING", "TimeLimit", run_time="00:01:00", max_crashes=2) for _ in range(3)]
    assert tries == [True, True, False]


def test_what_the_user_must_put_right_is_not_tried_again_though_srun_gives_another_code(told: Path) -> None:
    refusal(told.parent).touch()
    told.write_text("")
    assert main(137, told.parent, 3) == 2
    assert told.read_text() == ""
    assert main(0, told.parent, 3) == 0, "a later start of the same job"


def test_a_member_of_an_array_is_told_by_its_own_name(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of one member is that of the whole array."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "100")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert decide(told, 144, "RUNNING")
    assert told.read_text().splitlines() == ["--oneliner show job 100_3", "requeue incomplete 100_3"]


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_rank_leaves_word_of_what_the_user_must_put_right_where_it_can(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @main_guard
    def refuse() -> int:
        raise UserError("this is wrong")

    monkeypatch.setenv(REFUSAL_VARIABLE, str(tmp_path / folder / "100.refused"))
    assert refuse() == 2
    assert capsys.readouterr().err == "error: this is wrong\n"
    assert (tmp_path / "100.refused").exists() == (folder == ".")
