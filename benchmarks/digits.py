"""Cross-entropy, DivideMix and ScanMix on scikit-learn's digits with 80 and 90 % symmetric noise, three seeds each.

    python benchmarks/digits.py

The runs are those of `make demo` (configs/demo.yaml), through the commands that users type, on two local ranks; at 90 %
with what the papers change for it (and twice the epochs). A seed is that of the noise and of the run. Leaves
benchmarks/results/digits-DATE.json.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import commands
import record
from commands import run_python

from nldist.errors import main_guard

METHODS = ("cross_entropy", "dividemix", "scanmix")
# DivideMix's authors' code and issues 10 and 46 of it. ScanMix's code keeps tau at 0.5; its warm-up, of the head alone,
# is longer here, because a fifth of so few labels is right.
AT_90 = {
    "cross_entropy": ["train.epochs=40"],
    "dividemix": ["train.epochs=40", "method.mixture.history=5", "method.dividemix.tau=0.6"],
    "scanmix": ["train.epochs=40", "method.mixture.history=5", "method.dividemix.warmup_epochs=15"],
}


@main_guard
def main() -> None:
    """Train what has not been trained yet, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/digits"))
    parser.add_argument("--rates", type=int, nargs="+", default=[80, 90], help="percent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    data = options.work / "data"
    run_python("tools/shard.py", "digits", str(data), "--name", "digits")
    rows = [
        train(method, rate, seed, options.work, data)
        for rate in options.rates
        for seed in options.seeds
        for method in METHODS
    ]
    report(rows)
    print(f"recorded in {record.write('digits', ['torch', 'torchvision', 'scikit-learn'], {'runs': rows})}")


def train(method: str, rate: int, seed: int, work: Path, data: Path) -> dict[str, Any]:
    """One run on two local ranks; its summary, with rate and seed."""
    name = f"sym{rate}-{seed}"
    noise = ["--model", "symmetric", "--rate", str(rate / 100), "--seed", str(seed), "--name", name]
    run_python("tools/noise.py", str(data), *noise)
    run_dir = work / name / method
    settings = [f"method.name={method}", f"run.dir={run_dir}", f"run.stages_dir={work / 'stages'}", f"run.seed={seed}"]
    settings += [f"data.root={data}", f"data.label_set={name}", "track.enabled=false"]
    settings += AT_90[method] if rate == 90 else []
    commands.train("configs/demo.yaml", *settings)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return {"rate": rate, **summary}


def report(rows: list[dict[str, Any]]) -> None:
    """Print a line per run, and whether each method's `last` is above the one before."""
    print(f"{'rate':>4}  {'seed':>4}  {'method':13}  {'best %':>6}  {'last %':>6}  {'split AUC':>9}")
    for row in rows:
        auc = f"{row['split']['auc']:9.3f}" if row["split"] else f"{'-':>9}"
        scores = f"{row['accuracy']['best']:6.2f}  {row['accuracy']['last']:6.2f}  {auc}"
        print(f"{row['rate']:4}  {row['seed']:4}  {row['method']:13}  {scores}")
    for better, worse in ((METHODS[1], METHODS[0]), (METHODS[2], METHODS[1])):
        last = {(row["method"], row["rate"], row["seed"]): row["accuracy"]["last"] for row in rows}
        gains = [value - last[worse, rate, seed] for (method, rate, seed), value in last.items() if method == better]
        print(f"{better} over {worse}: {min(gains):+.2f} to {max(gains):+.2f}, median {statistics.median(gains):+.2f}")


if __name__ == "__main__":
    sys.exit(main())
