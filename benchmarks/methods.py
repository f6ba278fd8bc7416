"""Every method on 5,000 real CIFAR-10 images, some seeds each, against cross-entropy: the papers' claims in small.

    python benchmarks/methods.py sym40            # 40 % of the labels drawn at random
    python benchmarks/methods.py sym80
    python benchmarks/methods.py worst            # CIFAR-10N "worst": real human labels, 40 % wrong
    python benchmarks/methods.py sym40 --methods cross_entropy dividemix sanm --seeds 0

All get the network, views, rate, schedule and epochs of benchmarks/methods.yaml; what is a method's own is in RUNS, its
phases shortened with the number of epochs, and for ScanMix, which has pretext and clustering before it, in
methods-scanmix.yaml. Each run is one rank with one thread, --jobs of them beside each other.
Needs what benchmarks/cifar.py needs. Runs that are done are not trained again; a run that was cut short goes on. Leaves
benchmarks/results/methods-LABELS-DATE.json: accuracies, and how many of the labels that a run suggests at its end are
right, beside the given ones.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import record
from cifar import prepare
from commands import run_python

from nldist.errors import UserError, main_guard

BASELINE = "cross_entropy"
_CO_TEACHING = ["method.co_teaching.forget_rate=RATE", "method.co_teaching.gradual_epochs=5"]
_DIVIDEMIX = ["method.name=dividemix", "method.dividemix.warmup_epochs=6"]
_MIXNN = ["method.name=mixnn", "method.mixnn.warmup_epochs=4", "method.mixnn.turning_epoch=8"]
# Soft labels move seven times, not 25 times as in the 300 epochs of the released code: the more each time.
_MIXNN += ["method.mixnn.update_every=2", "method.mixnn.momentum=0.7", "optim.restart_epochs=4", "optim.min_lr=0.002"]
# The high rates after a restart are in the mean of the last ten epochs, which are half of all here.
_NO_RESTARTS = ["optim.restart_epochs=null", "optim.min_lr=0"]
RUNS = {
    BASELINE: ["method.name=cross_entropy"],
    "mixup": ["method.name=mixup"],
    "elr": ["method.name=elr"],
    "selc": ["method.name=selc", "method.selc.turning_epoch=8", "method.selc.momentum=0.8"],
    "co_teaching": ["method.name=co_teaching", *_CO_TEACHING],
    "co_teaching_plus": ["method.name=co_teaching_plus", "method.co_teaching_plus.warmup_epochs=13", *_CO_TEACHING],
    "forward": ["method.name=forward", "method.forward.estimate_epochs=20"],
    # Labels are learnt in 9 epochs, not 130.
    "pencil": [
        "method.name=pencil",
        "method.pencil.warmup_epochs=6",
        "method.pencil.correction_epochs=9",
        "method.pencil.label_lr=2000",
        "method.pencil.finetune_lr=0.04",
    ],
    "m_correction": [
        "method.name=m_correction",
        "method.m_correction.warmup_epochs=6",
        "method.m_correction.alpha=1",  # the published 32 is for 300 epochs
    ],
    # Dilution as weak as features of a small network allow (docs/lend.md); weights in the loss are about 0.3 then.
    "lend": [
        "method.name=lend",
        "method.lend.k=8",
        "method.lend.alpha=0.8",
        "train.batch_size=128",
        "optim.lr=0.12",
    ],
    "lend_paper": ["method.name=lend", "method.lend.profile=paper", "method.lend.k=8", "train.batch_size=128"],
    "mixnn": _MIXNN,
    "mixnn_data_set": [*_MIXNN, "method.mixnn.neighbours=data_set", "method.mixnn.refresh_epochs=4"],
    "dividemix": _DIVIDEMIX,
    "sanm": [*_DIVIDEMIX, "method.ssl=sanm"],
    "scanmix": ["method.name=scanmix"],
}
CONFIGS = {"scanmix": "benchmarks/methods-scanmix.yaml"}

# What other labels need, by which PENCIL's authors choose its rate, too: chosen on their seed 0, as RUNS on sym40's.
OTHER_LABELS: dict[str, dict[str, list[str]]] = {
    "worst": {"pencil": ["method.pencil.label_lr=100"], **dict.fromkeys(("mixnn", "mixnn_data_set"), _NO_RESTARTS)},
    "sym80": {
        "co_teaching": ["method.co_teaching.gradual_epochs=15"],
        "co_teaching_plus": ["method.co_teaching.gradual_epochs=15", "method.co_teaching_plus.warmup_epochs=17"],
        "pencil": ["method.pencil.label_lr=500"],
        "m_correction": [
            "method.m_correction.warmup_epochs=10",
            "method.m_correction.alpha=32",
            "method.m_correction.bootstrap=soft",
        ],
    },
}


@main_guard
def main() -> None:
    """Train what has not been trained yet, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", help="worst, or symPERCENT")
    parser.add_argument("--methods", nargs="+", choices=tuple(RUNS), default=tuple(RUNS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other")
    parser.add_argument("--source", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    options = parser.parse_intermixed_args()
    if not re.fullmatch(r"worst|sym\d+", options.labels):
        raise UserError(f"labels={options.labels} is neither worst nor such as sym40")
    prepare(options, num_train=5000, num_test=2000)
    # By seeds, so that what there is after a while has all methods.
    wanted = [(name, seed) for seed in options.seeds for name in options.methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(lambda run: train(run[0], run[1], options), wanted))
    report(options.methods, rows)
    results = {"labels": options.labels, "runs": rows}
    print(f"recorded in {record.write(f'methods-{options.labels}', ['torch', 'torchvision', 'webdataset'], results)}")


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own, silent but for errors; its summary, and how many suggested labels are right."""
    run_dir: Path = options.work / options.labels / f"{name}-{seed}"
    rate = 0.4 if options.labels == "worst" else int(options.labels.removeprefix("sym")) * 0.9 / 100
    settings = [f"run.dir={run_dir}", f"run.seed={seed}", f"data.root={options.work / 'data'}", "dist.num_threads=1"]
    settings += [f"data.label_set={options.labels}", *RUNS[name]]
    settings += [*OTHER_LABELS.get(options.labels, {}).get(name, []), *options.overrides]
    run_python(
        "-m",
        "nldist.cli",
        "train",
        CONFIGS.get(name, "benchmarks/methods.yaml"),
        *(setting.replace("RATE", f"{rate:.3g}") for setting in settings),
        quiet=True,
    )
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    print(f"{name}, seed {seed}: last {summary['accuracy']['last']:.2f} in {summary['seconds']:.0f} s", flush=True)
    clean = pq.read_table(options.work / "data" / "train" / "labels" / "clean.parquet")["label"].to_numpy()
    labels_right = right(run_dir / "tables" / "samples.parquet", clean)
    return {"run": name, **summary, "labels_right": labels_right}


def right(samples: Path, clean: np.ndarray) -> dict[str, float]:
    """How many per cent of the given and of the suggested labels are the true ones."""
    table = pq.read_table(samples).sort_by("id")
    return {name: 100 * float((table[name].to_numpy() == clean).mean()) for name in ("label", "suggested")}


def report(names: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Print a line per method: means over the seeds, and the gain over cross-entropy seed by seed."""
    last = {(row["run"], row["seed"]): row["accuracy"]["last"] for row in rows}
    print(f"{'method':17}  best %    last %          over {BASELINE}, by seed      suggested right %  split AUC    s")
    for name in names:
        own = [row for row in rows if row["run"] == name]
        scores = [row["accuracy"]["last"] for row in own]
        spread = f"+-{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        gains = [last[name, row["seed"]] - last.get((BASELINE, row["seed"]), float("nan")) for row in own]
        suggested = statistics.fmean(row["labels_right"]["suggested"] for row in own)
        auc = statistics.fmean(row["split"]["auc"] for row in own if row["split"])
        best, seconds = (
            statistics.fmean(values)
            for values in zip(*((r["accuracy"]["best"], r["seconds"]) for r in own), strict=True)
        )
        print(
            f"{name:17}  {best:6.2f}  {statistics.fmean(scores):6.2f} {spread:8}  "
            f"{' '.join(f'{gain:+6.2f}' for gain in gains):28}  {suggested:17.2f}  {auc:9.3f}  {seconds:5.0f}"
        )


if __name__ == "__main__":
    sys.exit(main())
