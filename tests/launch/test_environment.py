import os

import pytest

from nldist.dist.environment import Place, job_id, num_restarts
from nldist.errors import UserError

# As `srun --nodes 3 --ntasks 5 --cpus-per-task 2` gave them to the last task.
STEP = {
    "SLURM_JOB_ID": "317",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_CPUS_ON_NODE": "2",
    "SLURM_STEP_NODELIST": "n[07,11-12]",
}


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID")
    for name in os.environ:
        if name.startswith(("SLURM", "SUBMITIT")) or name in torchrun:
            monkeypatch.delenv(name)


def setenv(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_nothing_is_one_rank() -> None:
    assert Place.find() == Place()
    assert (job_id(), num_restarts()) == (None, 0)


@pytest.mark.parametrize(("text", "alone", "under_torchrun"), [("1", 1, None), ("3", 3, 3), ("4,2", None, None)])
def test_the_users_number_of_threads_counts(
    monkeypatch: pytest.MonkeyPatch, text: str, alone: int | None, under_torchrun: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert Place.find().num_threads == alone
    setenv(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert Place.find().num_threads == alone
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    # torchrun sets 1 where the user has set nothing.
    assert Place.find().num_threads == under_torchrun


def test_a_slurm_step(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, STEP)
    place = Place.find()
    assert (place.rank, place.size, place.local_rank, place.num_local, place.num_threads) == (4, 5, 0, 1, 2)
    assert place.address == "n07"
    ports = {place.port}
    for job in ("318", "319"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        ports.add(Place.find().port)
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    ports.add(Place.find().port)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ports.add(Place.find().port)
    assert len(ports) == 5, "jobs, steps and starts do not meet on one port"


def test_a_batch_script_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"})
    assert Place.find() == Place()


def test_torchrun_counts_before_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    setenv(monkeypatch, STEP | ranks)
    assert Place.find() == Place(3, 4, 1, 2)


def test_a_broken_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"environment is broken .*WORLD_SIZE.*submit\.py, torchrun or srun"):
        Place.find()


def test_the_job_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, {"SLURM_JOB_ID": "21", "SLURM_RESTART_COUNT": "2"})
    assert (job_id(), num_restarts()) == ("21", 2)
    setenv(monkeypatch, {"SLURM_ARRAY_JOB_ID": "20", "SLURM_ARRAY_TASK_ID": "1"})
    assert job_id() == "20_1"
