"""CPU seconds that commands take before they do anything, of this nldist and of nldist 0.1 (c551f53), taking turns.

    python benchmarks/start.py
    python benchmarks/start.py --demo      make demo, too: about half an hour

A row is user and system time of a command and of all that it has started, MLflow's process included, on scikit-learn's
digits: CPU time hardly depends on what else the machine does. "To the first step" ends a training run as soon as the
first step's record is there. The older nldist is checked out into a temporary folder; both use the same environment,
with the bytecode that a first, uncounted turn has left.
Leaves benchmarks/results/start-DATE.json.
"""

import argparse
import contextlib
import ctypes
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import record

from nldist.errors import main_guard

REPOSITORY = Path(__file__).parent.parent
BEFORE = "c551f53"
ADOPT_ORPHANS = 36  # prctl's PR_SET_CHILD_SUBREAPER
SHORT = ("method.name=cross_entropy", "train.epochs=1", "track.every_seconds=1e-9")
DEMO = ("cross_entropy", "dividemix", "scanmix")


@main_guard
def main() -> None:
    """Measure both in turn, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="rows whose names begin so")
    parser.add_argument("--demo", action="store_true", help="whole runs of make demo, once")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)  # or what outlives the process that started it is not counted
    with tempfile.TemporaryDirectory() as work, checkout(BEFORE, Path(work) / "before") as before:
        trees = {"before": before, "now": REPOSITORY}
        rows = {}
        for name, measure in rows_of(Path(work), options.demo).items():
            if options.only and not name.startswith(options.only):
                continue
            turns = 1 if name == "make demo" else options.repeats + 1
            seconds = [{side: measure(tree) for side, tree in trees.items()} for _ in range(turns)]
            medians = {side: statistics.median(turn[side] for turn in seconds[turns > 1 :]) for side in trees}
            rows[name] = medians | {"ratio": medians["now"] / medians["before"]}
            print(f"{name:46} {medians['before']:7.2f} {medians['now']:7.2f} {rows[name]['ratio']:5.2f}", flush=True)
    print(f"recorded in {record.write('start', ['torch', 'torchvision', 'mlflow'], {'cpu_seconds': rounded(rows)})}")


def rounded(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """To two decimals."""
    return {name: {key: round(value, 2) for key, value in row.items()} for name, row in rows.items()}


@contextlib.contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of a commit."""
    git = ["git", "-C", str(REPOSITORY), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def rows_of(work: Path, demo: bool) -> dict[str, Callable[[Path], float]]:
    """What is measured: the CPU seconds of it in a work tree."""
    data, run = work / "data", work / "run"
    cpu_seconds(REPOSITORY, "tools/shard.py", "digits", data)
    cpu_seconds(REPOSITORY, "tools/noise.py", data, "--model=symmetric", "--rate=0.5", "--name=sym50")
    train = ["-m", "nldist.cli", "train", "tests/digits.yaml", *SHORT, f"data.root={data}", f"run.dir={run}"]
    alone, lines = "track.enabled=false", run / "metrics.jsonl"

    def again(*arguments: object, until: Path | None = None) -> Callable[[Path], float]:
        def measure(tree: Path) -> float:
            shutil.rmtree(run, ignore_errors=True)
            (work / "mlflow.db").unlink(missing_ok=True)
            return cpu_seconds(tree, *arguments, until=until)

        return measure

    submit = ["launcher/submit.py", *train[3:], alone, "--cluster=local", "--tasks-per-node=2", "--wait"]
    rows = {
        "import torch": again("-c", "import torch"),
        "nldist --help": again("-m", "nldist.cli", "--help"),
        "the reader of images": again("-c", "import nldist.data.reader"),
        "shard digits": again("tools/shard.py", "digits", run),
        "train to the first step, without MLflow": again(*train, alone, until=lines),
        "train to the first step, with MLflow": again(*train, until=lines),
        "two local ranks to the first step": again(*submit, until=lines),
        "train one epoch, without MLflow": again(*train, alone),
        "train one epoch, with MLflow": again(*train),
        "status of a run": lambda tree: cpu_seconds(tree, "-m", "nldist.cli", "status", run),
    }
    return rows | ({"make demo": lambda tree: make_demo(tree, work / "demo")} if demo else {})


def make_demo(tree: Path, folder: Path) -> float:
    """The CPU seconds of what `make demo` runs, on two ranks."""
    shutil.rmtree(folder, ignore_errors=True)
    seconds = cpu_seconds(tree, "tools/shard.py", "digits", folder / "data", "--name=digits")
    noise = ["--model=symmetric", "--rate=0.8", "--seed=0", "--name=sym80"]
    seconds += cpu_seconds(tree, "tools/noise.py", folder / "data", *noise)
    local = ["--cluster=local", "--tasks-per-node=2", f"data.root={folder / 'data'}"]
    local += [f"run.stages_dir={folder / 'stages'}"]
    if (tree / "nldist" / "cli" / "compare.py").exists():
        study = ["-m", "nldist.cli", "compare", "configs/demo.yaml", f"run.dir={folder}", f"--methods={','.join(DEMO)}"]
        return seconds + cpu_seconds(tree, *study, *local)
    for method in DEMO:
        settings = [f"method.name={method}", f"run.dir={folder / method}"]
        seconds += cpu_seconds(tree, "launcher/submit.py", "configs/demo.yaml", *settings, *local, "--wait")
    runs = [folder / method for method in DEMO]
    return seconds + cpu_seconds(tree, "-m", "nldist.cli", "compare", *runs)


def cpu_seconds(tree: Path, *arguments: object, until: Path | None = None) -> float:
    """User and system seconds of `python ARGUMENTS` of a work tree, until it has ended or has written to `until`."""
    begin = _of_children()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=tree,
        env=environment(tree),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while until is not None and not (until.exists() and until.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    if until is not None:
        for pid in _descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if process.wait() not in (0, -signal.SIGKILL if until else 0):
        raise RuntimeError(f"{arguments} in {tree} ended with {process.returncode}")
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return _of_children() - begin


def environment(tree: Path) -> dict[str, str]:
    """In which a command of a work tree runs: with a thread, and its bytecode kept."""
    facts = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    facts.pop("PYTHONDONTWRITEBYTECODE", None)
    return facts


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for process in found:
        for children in Path("/proc").glob(f"{process}/task/*/children"):
            found += map(int, children.read_text().split())
    return found


if __name__ == "__main__":
    sys.exit(main())
