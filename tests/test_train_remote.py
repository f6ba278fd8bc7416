"""A run on shards elsewhere is the run on local ones, also after its server has died and come back."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from nldist.data import remote
from nldist.data.make.verify import verify
from tests.conftest import REPOSITORY
from tests.file_server import FileServer
from tests.jobs import output, run_job
from tests.s3_server import S3Server
from tests.test_train import assert_same_weights

# Two epochs of which each copies all shards again: the cache holds none but those that are read.
SETTINGS = ("method.name=cross_entropy", "train.epochs=2", "data.num_workers=1", "data.cache_gib=1e-9")


def prepare(env: Mapping[str, str]) -> None:
    """What a rank begins with."""
    os.environ.update(env)
    remote.WAITS = (0.01,) * 5


def documented(root: Path, base: str) -> None:
    """Change the shards' places in dataset.json as docs/data.md says."""
    program = (REPOSITORY / "docs" / "data.md").read_text().split("<<'END'\n")[1].split("    END\n")[0]
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), root, base], check=True)


def moved(digits: Path, root: Path, url_of: Callable[[Path], str]) -> Path:
    """The data set, whose shards are where `url_of` has put them."""
    shutil.copytree(digits, root)
    facts = json.loads((root / "dataset.json").read_text())
    for split in facts["splits"].values():
        for shard in split["shards"]:
            path = root / shard["path"]
            shard["path"] = url_of(path)
            path.unlink(missing_ok=True)
    (root / "dataset.json").write_text(json.dumps(facts))
    return root


def served(folder: Path, base: str, path: Path) -> str:
    """Move a shard to where a server has it."""
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)
    return f"{base}/{path.name}?X-Signature=nottobetold"


@pytest.fixture(scope="module")
def local(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("local") / "run"
    assert run_job(run_dir, f"data.root={digits}", *SETTINGS, world_size=2) == [0, 0]
    return run_dir


def test_shards_on_s3_give_the_weights_of_local_ones(
    local: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "runs" / "run"
    run_dir.parent.mkdir()
    with S3Server() as store:
        root = Path(shutil.copytree(digits, tmp_path / "data"))
        for tar in root.rglob("*.tar"):
            base = store.upload(tar, f"digits/{tar.relative_to(root)}").removesuffix(f"/{tar.relative_to(root)}")
            tar.unlink()
        documented(root, base)
        for name, value in store.env.items():
            monkeypatch.setenv(name, value)
        assert not verify(root).problems
        store.faults = ["", "drop", 503, "", "drop"]
        settings = (f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}", *SETTINGS)
        assert run_job(run_dir, *settings, world_size=2, prepare=partial(prepare, store.env)) == [0, 0]
    assert not store.faults
    assert_same_weights(local, run_dir)
    assert_nothing_secret(run_dir.parent)


def assert_nothing_secret(folder: Path) -> None:
    """In no file that runs have left: logs, records, checkpoints, weights, MLflow's store."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".log" for path in files)
    assert [path for path in files if b"nottobetold" in path.read_bytes()] == []


def test_a_server_that_dies_ends_the_run_which_goes_on_when_it_is_back(
    local: Path, digits: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "run"
    run_dir.parent.mkdir()
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    with FileServer(tmp_path / "served") as server:
        base = f"http://me:nottobetold@127.0.0.1:{server.server_port}"
        root = moved(digits, tmp_path / "data", partial(served, tmp_path / "served", base))
        settings = (f"data.root={root}", cache, "track.enabled=true", *SETTINGS)
        server.faults = [*[""] * 12, "dies"]  # in the second epoch
        assert run_job(run_dir, *settings, world_size=2, prepare=partial(prepare, {})) == [2, 2]
    told = output(run_dir) + output(run_dir, rank=1)
    assert "Traceback" not in told
    errors = re.findall(r"error: .*", told)  # of one rank, or of both where each was at a shard of its own
    assert errors
    assert all(re.match(r"error: shard http://127.*after 6 tries", error) for error in errors), errors
    with FileServer(tmp_path / "served", server.server_port):
        assert run_job(run_dir, *settings, world_size=2, prepare=partial(prepare, {})) == [0, 0]
    assert "resumed from" in output(run_dir)
    assert_same_weights(local, run_dir)
    assert_nothing_secret(run_dir.parent)
