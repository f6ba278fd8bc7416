"""The methods on real CIFAR-10 images, on a CPU, through the commands that users type.

    python benchmarks/cifar.py sym50     # 5,000 images, half of the labels drawn at random: DivideMix, cross-entropy
    python benchmarks/cifar.py worst     # 5,000 images, CIFAR-10N "worst": real human labels, 40 % wrong
    python benchmarks/cifar.py sym80     # 10,000 images, 80 % drawn at random: ScanMix, its ablation, DivideMix

Needs `cifar10_images.tar.gz` (train/CLASS/NNNN.jpg, test/CLASS/NNNN.jpg) and, for worst, `cifar10n_labels.csv`
in the directory given by --source. Every test image is used. All methods get the same network, learning rate, schedule
and number of epochs (benchmarks/cifar5k.yaml, cifar10k.yaml); the ablation is ScanMix without its clustering passes:
DivideMix begun from pretext and clustering. Leaves benchmarks/results/cifar-LABELS-DATE.json.
"""

import argparse
import json
import os
import random
import sys
import tarfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import commands
import record
from commands import run_python

from nldist.errors import UserError, main_guard
from nldist.run.status import clock

ABLATION = "scanmix_without_clustering"


@dataclass(frozen=True)
class Setting:
    """One comparison: how many images, which configuration, which runs with which settings; the last should win."""

    num_train: int
    config: str
    runs: dict[str, list[str]]


_FIRST = Setting(
    5000, "cifar5k", {"cross_entropy": ["method.name=cross_entropy"], "dividemix": ["method.name=dividemix"]}
)
SETTINGS = {
    "sym50": _FIRST,
    "worst": _FIRST,
    "sym80": Setting(
        10_000,
        "cifar10k",
        {
            "dividemix": ["method.name=dividemix"],
            ABLATION: ["method.name=scanmix", "method.scanmix.cluster_every=null"],
            "scanmix": ["method.name=scanmix"],
        },
    ),
}


@main_guard
def main() -> None:
    """Prepare the data, train the methods, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", choices=tuple(SETTINGS))
    parser.add_argument("--source", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--work", type=Path, default=Path("runs"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all methods")
    options = parser.parse_intermixed_args()
    setting = SETTINGS[options.labels]
    options.work = options.work / setting.config
    began = time.perf_counter()
    prepare(options, setting.num_train)
    runs = {name: train(name, setting, options) for name in setting.runs}
    seconds = time.perf_counter() - began
    run_python("-m", "nldist.cli", "compare", *map(str, runs.values()))
    summaries = {name: json.loads((run / "summary.json").read_text()) for name, run in runs.items()}
    *others, best = setting.runs
    gains = {name: summaries[best]["accuracy"]["last"] - summaries[name]["accuracy"]["last"] for name in others}
    for name, gain in gains.items():
        print(f"{best}: last {gain:+.2f} points from {name}'s")
    print(f"all in {clock(seconds)}")
    results = {"labels": options.labels, "seconds_in_all": seconds, "gain_in_last": gains, "runs": summaries}
    print(f"recorded in {record.write(f'cifar-{options.labels}', ['torch', 'torchvision', 'webdataset'], results)}")


def prepare(options: argparse.Namespace, num_train: int, num_test: int = 10_000) -> None:
    """Unpack, shard and label; steps that are done already cost seconds."""
    raw, data = options.work / "raw", options.work / "data"
    if not raw.exists():
        unpack(options.source / "cifar10_images.tar.gz", raw, {"train": num_train, "test": num_test})
    for split in ("train", "test"):
        run_python(
            "tools/shard.py", "folder", str(raw / split), str(data), "--split", split, "--name", options.work.name
        )
    noise = ["tools/noise.py", str(data), "--name"]
    if options.labels != "worst":
        rate = int(options.labels.removeprefix("sym")) / 100
        run_python(*noise, options.labels, "--model", "symmetric", "--rate", str(rate), "--seed", "0")
        return
    table = ["--csv", str(options.source / "cifar10n_labels.csv"), "--path-column", "path", "--label-column"]
    for name in ("clean", "worst"):
        run_python(*noise, name, *table, name)


def unpack(archive: Path, target: Path, counts: dict[str, int]) -> None:
    """A seeded, class-balanced choice of each split's images."""
    if not archive.exists():
        raise UserError(f"{archive} is missing; name its directory with --source")
    aside = target.with_name(target.name + ".part")
    with tarfile.open(archive) as tar:
        by_class: dict[tuple[str, str], list[tarfile.TarInfo]] = defaultdict(list)
        for member in filter(tarfile.TarInfo.isfile, tar.getmembers()):
            split, name = Path(member.name).parts[-3:-1]
            by_class[split, name].append(member)
        chosen = []
        for (split, name), members in sorted(by_class.items()):
            number = counts[split] * len(counts) // len(by_class)
            chosen += random.Random(f"nldist {name}").sample(sorted(members, key=lambda m: m.name), number)
        for member in chosen:
            member.name = str(Path(*Path(member.name).parts[-3:]))
        # In the archive's order: a compressed file cannot be read backwards.
        tar.extractall(aside, sorted(chosen, key=lambda member: member.offset), filter="data")
    os.replace(aside, target)


def train(name: str, setting: Setting, options: argparse.Namespace) -> Path:
    """One run on local ranks; its run directory."""
    run_dir: Path = options.work / options.labels / name
    settings = [f"run.dir={run_dir}", f"run.stages_dir={options.work / 'stages'}", f"data.root={options.work / 'data'}"]
    settings += [f"data.label_set={options.labels}", *setting.runs[name], *options.overrides]
    commands.train(f"benchmarks/{setting.config}.yaml", *settings, ranks=options.ranks)
    return run_dir


if __name__ == "__main__":
    sys.exit(main())
