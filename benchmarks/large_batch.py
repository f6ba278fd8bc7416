"""DivideMix with larger global batches: what it loses, and what the learning-rate rules give back.

    python benchmarks/large_batch.py

Digits with half of the labels drawn at random, two local ranks, batches of 128 to 1,024 over both, 30 epochs whatever
the batch, three seeds; with the rate as it is, with its root and in proportion. Leaves
benchmarks/results/large_batch-DATE.json. (DivideMix issue 53: users report that accuracy falls with the batch.)
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import record
from commands import run_python, train

from nldist.errors import main_guard

BATCHES = (128, 256, 512, 1024)
RULES = ("none", "sqrt", "linear")


@main_guard
def main() -> None:
    """Train what has not been trained yet, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/large_batch"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    data = options.work / "data"
    run_python("tools/shard.py", "digits", str(data), "--name", "digits")
    rows = []
    for batch in BATCHES:
        for rule in RULES if batch > BATCHES[0] else RULES[:1]:
            runs = [run(options.work, data, batch, rule, seed) for seed in options.seeds]
            last = [summary["accuracy"]["last"] for summary in runs]
            auc = statistics.median(summary["split"]["auc"] for summary in runs)
            rows.append({"batch": batch, "rule": rule, "last": last, "median": statistics.median(last), "auc": auc})
    print(f"{'batch':>6}  {'rule':6}  {'last %, median':>14}  {'lowest':>6}  {'split AUC':>9}")
    for row in rows:
        print(f"{row['batch']:6}  {row['rule']:6}  {row['median']:14.2f}  {min(row['last']):6.2f}  {row['auc']:9.3f}")
    print(f"recorded in {record.write('large_batch', ['torch'], {'runs': rows})}")


def run(work: Path, data: Path, batch: int, rule: str, seed: int) -> dict[str, Any]:
    """The summary of one run on two ranks; a run that is there already is not repeated."""
    name = f"sym50-{seed}"
    run_python("tools/noise.py", str(data), "--model=symmetric", "--rate=0.5", f"--seed={seed}", "--name", name)
    run_dir = work / f"{batch}-{rule}-{seed}"
    settings = [f"run.dir={run_dir}", f"run.seed={seed}", f"data.root={data}", f"data.label_set={name}"]
    settings += [f"train.batch_size={batch // 2}", "optim.lr_batch=128", f"optim.lr_rule={rule}", "track.enabled=false"]
    train("tests/digits.yaml", *settings)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


if __name__ == "__main__":
    sys.exit(main())
