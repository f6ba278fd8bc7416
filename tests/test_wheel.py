"""What is installed from the wheel does what the repository does, from any directory."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable

import pytest

from tests.conftest import REPOSITORY

Run = Callable[..., str]
PROGRAM = """
import json, pathlib
from nldist.config.file import load_config, own_configs
pathlib.Path("mine.yaml").write_text("include: nldist:cifar10/dividemix.yaml")
print(load_config("mine.yaml") == load_config("nldist:cifar10/dividemix.yaml"))
print(json.dumps(sorted(str(path.relative_to(own_configs())) for path in own_configs().rglob("*.yaml"))))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of a fresh environment that has the wheel, and of this one the dependencies."""
    root = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(root)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(root / "env")], check=True)
    python, elsewhere = root / "env" / "bin" / "python", root / "elsewhere"
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True)
    elsewhere.mkdir()
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}

    def run(*arguments: str, command: str = "nldist", code: int = 0) -> str:
        words = [str(root / "env" / "bin" / command), *arguments]
        done = subprocess.run(words, cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_the_demo_s_commands_work_from_the_wheel(installed: Run) -> None:
    where = installed("-c", "import nldist; print(nldist.__file__)", command="python")
    assert str(REPOSITORY) not in where
    assert "1,437 images" in installed("shard", "digits", "runs/demo/data", "--name", "digits")
    assert "sym80" in installed("noise", "runs/demo/data", "--model", "symmetric", "--rate", "0.8", "--name", "sym80")
    short = ["method.name=cross_entropy", "train.epochs=1", "track.enabled=false"]
    local = ["--cluster", "local", "--tasks-per-node", "2", "--wait"]
    installed("submit", "nldist:demo.yaml", *local, *short, "run.dir=runs/demo/cross_entropy")
    table = installed("compare", "runs/demo/cross_entropy", "--out", ".")
    assert table.splitlines()[1].split()[0] == "cross_entropy"
    assert "done" in installed("status", "runs/demo/cross_entropy")
    assert "labels are probably wrong" in installed("audit", "runs/demo/cross_entropy"), "its templates are there"


def test_configurations_come_with_it(installed: Run) -> None:
    same, files = installed("-c", PROGRAM, command="python").splitlines()
    assert same == "True"
    ours = REPOSITORY / "configs"
    assert json.loads(files) == sorted(str(path.relative_to(ours)) for path in ours.rglob("*.yaml"))
    told = installed("train", "nldist:cifar10/dividemx.yaml", code=2)
    assert told == (
        "error: nldist:cifar10/dividemx.yaml does not come with nldist; did you mean nldist:cifar10/dividemix.yaml?\n"
    )
