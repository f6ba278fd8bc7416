"""Cross-entropy against DivideMix on 5,000 real CIFAR-10 images, on a CPU, through the commands that users type.

    python benchmarks/cifar.py sym50     # half of the labels drawn at random
    python benchmarks/cifar.py worst     # CIFAR-10N "worst": real human labels, 40 % wrong

Needs `cifar10_images.tar.gz` (train/CLASS/NNNN.jpg, test/CLASS/NNNN.jpg) and, for worst, `cifar10n_labels.csv`
in the directory given by --source. Every test image is used. Both methods get the same network, views, learning
rate, schedule and number of epochs (benchmarks/cifar5k.yaml). Leaves benchmarks/results/cifar-LABELS-DATE.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from pathlib import Path

import record

from nldist.errors import UserError, main_guard
from nldist.progress import clock

METHODS = ("cross_entropy", "dividemix")


@main_guard
def main() -> None:
    """Prepare the data, train both methods, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", choices=("sym50", "worst"))
    parser.add_argument("--source", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--work", type=Path, default=Path("runs/cifar5k"))
    parser.add_argument("--num-train", type=int, default=5000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for both methods")
    options = parser.parse_intermixed_args()
    began = time.perf_counter()
    prepare(options)
    runs = [train(method, options) for method in METHODS]
    rows_file = options.work / f"table-{options.labels}.json"
    run_python("-m", "nldist.cli", "compare", *map(str, runs), "--json", str(rows_file))
    seconds = time.perf_counter() - began
    rows = json.loads(rows_file.read_text())
    gain = rows[1]["last"] - rows[0]["last"]
    print(f"DivideMix's last is {gain:+.2f} points from cross-entropy's; all in {clock(seconds)}")
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    results = {"labels": options.labels, "seconds_in_all": seconds, "gain_in_last": gain, "runs": summaries}
    print(f"recorded in {record.write(f'cifar-{options.labels}', ['torch', 'torchvision', 'webdataset'], results)}")


def prepare(options: argparse.Namespace) -> None:
    """Unpack, shard and label; steps that are done already cost seconds."""
    raw, data = options.work / "raw", options.work / "data"
    if not raw.exists():
        unpack(options.source / "cifar10_images.tar.gz", raw, options.num_train)
    for split in ("train", "test"):
        run_python("tools/shard.py", "folder", str(raw / split), str(data), "--split", split, "--name", "cifar10-5k")
    noise = ["tools/noise.py", str(data), "--name"]
    if options.labels == "sym50":
        run_python(*noise, "sym50", "--model", "symmetric", "--rate", "0.5", "--seed", "0")
        return
    table = ["--csv", str(options.source / "cifar10n_labels.csv"), "--path-column", "path", "--label-column"]
    for name in ("clean", "worst"):
        run_python(*noise, name, *table, name)


def unpack(archive: Path, target: Path, num_train: int) -> None:
    """All test images and a seeded, class-balanced choice of training images."""
    if not archive.exists():
        raise UserError(f"{archive} is missing; name its directory with --source")
    aside = target.with_name(target.name + ".part")
    with tarfile.open(archive) as tar:
        by_class: dict[str, list[tarfile.TarInfo]] = defaultdict(list)
        chosen = []
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and "test" in parts:
                chosen.append(member)
            elif member.isfile() and "train" in parts:
                by_class[parts[-2]].append(member)
        for name in sorted(by_class):
            members = sorted(by_class[name], key=lambda m: m.name)
            chosen += random.Random(f"nldist {name}").sample(members, num_train // len(by_class))
        for member in chosen:
            member.name = str(Path(*Path(member.name).parts[-3:]))
        # In the archive's order: a compressed file cannot be read backwards.
        tar.extractall(aside, sorted(chosen, key=lambda member: member.offset), filter="data")
    os.replace(aside, target)


def train(method: str, options: argparse.Namespace) -> Path:
    """One run on local ranks; its run directory."""
    run_dir: Path = options.work / options.labels / method
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    settings = [f"method.name={method}", f"run.dir={run_dir}", f"data.root={options.work / 'data'}"]
    settings += [f"data.label_set={options.labels}", *options.overrides]
    run_python(*ranks, "-m", "nldist.cli", "train", "benchmarks/cifar5k.yaml", *settings)
    return run_dir


def run_python(*arguments: str) -> None:
    """Run `python ARGUMENTS` with one thread per process; stop here if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    code = subprocess.run([sys.executable, *arguments], env=environment, check=False).returncode
    if code != 0:
        raise UserError(f"python {' '.join(arguments)} ended with code {code}")


if __name__ == "__main__":
    sys.exit(main())
