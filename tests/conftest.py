"""What tests of the whole system share: scikit-learn's digits, sharded by the real tools."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Before any of them is imported: the shapes in their signatures are checked at each call.
install_import_hook(["nldist.losses", "nldist.methods.masks"], "beartype.beartype")

import nldist.cli.noise  # noqa: E402
import nldist.cli.shard  # noqa: E402
from nldist.data.make.sources.base import Listing  # noqa: E402
from nldist.data.make.sources.digits import DigitsSource  # noqa: E402
from nldist.data.make.writer import WriteOptions, write_split  # noqa: E402
from tests.mlflow_server import Server  # noqa: E402

REPOSITORY = Path(__file__).parent.parent


def run_tool(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` from the repository's root."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, check=check, capture_output=True, text=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what this machine cannot run."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with label sets `clean` and `sym50`, in several shards."""
    return make_digits(tmp_path_factory.mktemp("digits"))


def make_digits(root: Path) -> Path:
    """Shard the digits into `root` as the fixture of this name has them."""
    assert nldist.cli.shard.main(["digits", str(root), "--shard-size=300", "--workers=0"]) == 0
    return with_noise(root)


def with_noise(root: Path) -> Path:
    """The data set, with half of its labels drawn at random in a label set of their own."""
    assert nldist.cli.noise.main([str(root), "--model=symmetric", "--rate=0.5", "--seed=0", "--name=sym50"]) == 0
    return root


class FewDigits(DigitsSource):
    """Every third of them."""

    def listing(self) -> Listing:
        whole = super().listing()
        return Listing(whole.table[::3], whole.classes)


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """479 images to learn from and 120 others, as `digits` has them: for what does not depend on how many there are."""
    root = tmp_path_factory.mktemp("few_digits")
    for split in ("train", "test"):
        write_split(FewDigits(split), root, split, WriteOptions(shard_size=100))
    return with_noise(root)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """An MLflow server that is not started yet."""
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.close()
