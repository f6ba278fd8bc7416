"""What modules bring in when they are imported: each process pays for it, and most processes need little."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from nldist.cli import COMMANDS
from nldist.methods.build import METHODS, method_class
from tests.conftest import REPOSITORY
from tests.jobs import DIGITS
from tests.ranks import free_port

# Takes seconds to import and is used at some places only. Those import it when they get there.
SLOW = (
    *("deepspeed", "faiss", "matplotlib", "mlflow", "numba", "pandas", "scipy", "sklearn", "sympy", "timm"),
    *("torch._dynamo", "torchvision"),
    *("aiohttp", "botocore", "fsspec", "s3fs"),  # only where a remote shard is read
)
# Prints, for each of the modules SLOW that are there after importing argv[1], who imported it first, and who that one.
PROGRAM = """
import importlib, sys
above = {}
class Watch:
    def find_spec(self, name, path=None, target=None):
        frame, names = sys._getframe(1), []
        while frame:
            who = frame.f_globals.get("__name__", "")
            if who not in ("importlib", "importlib._bootstrap", "importlib._bootstrap_external", "__main__", *names):
                names.append(who)
            frame = frame.f_back
        above.setdefault(name, names)
sys.meta_path.insert(0, Watch())
for module in sys.argv[1].split(","):
    importlib.import_module(module)
print({name: " < ".join(above.get(name, [])) for name in sys.argv[2].split(",") if name in sys.modules})
"""
# Whether torchvision is there after an image was decoded, and whether it decodes the image alike.
DECODER = """
import io, sys, torch
from PIL import Image
from nldist.data.decode import decoded
data = io.BytesIO()
Image.linear_gradient("L").save(data, "PNG")
pixels = torch.from_numpy(decoded(data.getvalue())).permute(2, 0, 1)
print("torchvision" in sys.modules)
import torchvision.io
tensor = torch.frombuffer(bytearray(data.getvalue()), dtype=torch.uint8)
print(torch.equal(pixels, torch.ops.image.decode_image(tensor, torchvision.io.ImageReadMode.RGB.value, True)))
"""
# The command argv[2:], and which of the modules argv[1] are there then.
COMMAND = """
import sys
from nldist.cli import main
assert main(sys.argv[2:]) == 0
print([name for name in sys.argv[1].split(",") if name in sys.modules])
"""
SEARCHING = ("scanmix", "mixnn")


def run(program: str, *arguments: object) -> str:
    """What a program prints in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


def slow_imports(modules: Iterable[str], slow: Sequence[str] = SLOW) -> dict[str, str]:
    """Those of `slow` that importing the modules in a fresh process brings in, each with the chain of its importers."""
    found: dict[str, str] = ast.literal_eval(run(PROGRAM, ",".join(modules), ",".join(slow)))
    return found


def test_what_computes_nothing_does_not_import_torch() -> None:
    commands = [f"nldist.cli.{name}" for name in ("shard", "noise", "verify", "status", "evaluate", "sync")]
    others = ["nldist.track.sender", "nldist.track.tracker", "nldist.launch.requeue", "nldist.data.make.writer"]
    assert slow_imports(["nldist.cli", *commands, *others], (*SLOW, "torch")) == {}


def test_commands_and_ranks_and_workers_import_what_all_runs_need() -> None:
    commands = [f"nldist.cli.{name.replace('-', '_')}" for name in COMMANDS]
    ranks = ["nldist.train.stages", "nldist.train.evaluate", "nldist.train.dry_run", "nldist.report.compare"]
    ranks += ["nldist.train.predict", "nldist.train.export", "nldist.train.serve"]
    launched = ["nldist.launch.submit", "nldist.launch.job", "nldist.launch.checks", "nldist.launch.comparison"]
    methods = [f"nldist.methods.{place.split('.')[0]}" for name, place in METHODS.items() if name not in SEARCHING]
    assert slow_imports([*commands, *ranks, *launched, *methods, "nldist.data.reader"]) == {}


def test_methods_that_search_neighbours_import_faiss_alone() -> None:
    modules = [method_class(name).__module__ for name in SEARCHING]
    assert set(slow_imports(modules)) == {"faiss"}


def test_the_decoder_comes_without_torchvision_and_is_the_same() -> None:
    """Also where torchvision is imported after it."""
    assert run(DECODER).split() == ["False", "True"]


def test_a_rank_that_trains_does_without_the_compiler(digits: Path, tmp_path: Path) -> None:
    settings = [f"data.root={digits}", f"run.dir={tmp_path / 'run'}", "train.epochs=1", "track.enabled=false"]
    settings += ["method.name=cross_entropy", "dist.device=cpu"]
    found = ast.literal_eval(run(COMMAND, ",".join(SLOW), "train", DIGITS, *settings).splitlines()[-1])
    # What it draws and writes at the end.
    assert set(found) <= {"matplotlib", "pandas"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["split"]["auc"] > 0.5


def test_ranks_that_only_look_do_without_what_ddp_needs(few_digits: Path, tmp_path: Path) -> None:
    settings = [f"data.root={few_digits}", f"run.dir={tmp_path / 'run'}", "method.name=cross_entropy", "train.epochs=1"]
    run(COMMAND, "", "train", DIGITS, *settings, "track.enabled=false", "dist.device=cpu")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", COMMAND, ",".join(SLOW), "evaluate", str(tmp_path / "run")]
    ranks = [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for rank in ranks:
        told, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0
        assert set(ast.literal_eval(told.splitlines()[-1])) <= {"matplotlib"}  # what is drawn
