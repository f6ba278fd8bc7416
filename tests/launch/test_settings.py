from pathlib import Path
from typing import Any

import pytest

from nldist.errors import UserError
from nldist.launch.settings import cluster_settings


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("24:00:00", 1440),
        ("2-00:30:00", 2910),
        ("90:00", 90),
        ("0:00:30", 1),
        ("0:01:01", 2),
        ("120", 120),
        ("1-12", 2160),
    ],
)
def test_times(time: str, minutes: int) -> None:
    assert cluster_settings("slurm", None, {"time": time, "grace_seconds": 5}).minutes == minutes


def test_options_go_before_the_file() -> None:
    Path("cluster.yaml").write_text("partition: gpu\naccount: vision\nnodes: 4\nsetup: [module load cuda]\n")
    settings = cluster_settings("slurm", None, {"nodes": 2, "gpus_per_node": 8})
    assert (settings.partition, settings.account, settings.setup) == ("gpu", "vision", ["module load cuda"])
    assert settings.num_ranks == 16
    here = cluster_settings("local", None, {"tasks_per_node": 2})
    assert (here.partition, here.num_ranks) == (None, 2), "the file is about the cluster"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus_per_node": 8, "tasks_per_node": 4}, "a rank takes one GPU"),
        ({"time": "tomorrow"}, "time 'tomorrow' is not"),
        ({"time": "0:01:00", "grace_seconds": 60}, "grace_seconds=60 is as long as the time limit"),
        ({"nodes": 0}, "nodes=0"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cluster_settings("slurm", None, options)


def test_a_time_that_yaml_reads_as_a_number_is_refused() -> None:
    Path("cluster.yaml").write_text("time: 24:00:00\n")
    with pytest.raises(UserError, match=r"cluster.yaml: time.* put it in quotes"):
        cluster_settings("slurm", None, {})
    Path("cluster.yaml").write_text('time: "24:00:00"\n')
    assert cluster_settings("slurm", None, {}).minutes == 24 * 60


def test_a_misspelt_setting_of_the_file_gets_the_right_one() -> None:
    Path("mine.yaml").write_text("partitoin: gpu\n")
    with pytest.raises(UserError, match=r"mine.yaml: partitoin is not a setting; did you mean partition\?"):
        cluster_settings("slurm", Path("mine.yaml"), {})
    with pytest.raises(UserError, match=r"absent.yaml cannot be read"):
        cluster_settings("slurm", Path("absent.yaml"), {})
