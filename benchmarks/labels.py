"""Which labels are wrong, against cleanlab; and what training again on the labels put right brings.

    python benchmarks/labels.py digits           # scikit-learn's digits, 80 % of the labels drawn at random
    python benchmarks/labels.py sym50            # 5,000 images of CIFAR-10, half drawn at random
    python benchmarks/labels.py worst            # CIFAR-10N "worst": real human labels, 40 % wrong

For each seed DivideMix and cross-entropy are trained on the given labels (digits: configs/demo.yaml; CIFAR-10:
benchmarks/methods.yaml), audited (`nldist audit`), and asked for the probabilities of all classes of their training
images (`nldist predict`). Those are what cleanlab gets, with the same labels. DivideMix's are nearly out of sample: it
does not learn the labels that it takes for wrong. Then cross-entropy is trained on the labels that `nldist noise
--from-run` puts right, and on the true ones. Needs cleanlab 2.x and, for CIFAR-10, what benchmarks/cifar.py
needs. Leaves benchmarks/results/labels-SETTING-DATE.json.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import record
from cifar import prepare
from commands import run_python
from methods import RUNS
from sklearn.metrics import roc_auc_score

from nldist.data.index import Index
from nldist.errors import main_guard

METHODS = ("dividemix", "cross_entropy")
SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


@main_guard
def main() -> None:
    """Train what has not been trained yet, print and record the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=("digits", "sym50", "worst"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other")
    parser.add_argument("--source", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    options = parser.parse_intermixed_args()
    if options.setting == "digits":
        options.work, options.labels, options.config = Path("runs/labels-digits"), "sym80", "configs/demo.yaml"
        options.settings = {name: [f"method.name={name}"] for name in METHODS}
        prepare_digits(options.work / "data")
    else:
        options.work, options.labels, options.config = Path("runs/methods"), options.setting, "benchmarks/methods.yaml"
        options.settings = RUNS
        prepare(options, num_train=5000, num_test=2000)
    runs = [(method, seed) for seed in options.seeds for method in METHODS]
    sets = [(seed, labels) for seed in options.seeds for labels in ("corrected", "clean")]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: train(run[0], run[1], options.labels, options), runs))
        rankings = [ranking(method, seed, options) for method, seed in runs]
        again = list(pool.map(lambda each: train_again(each[0], each[1], options), sets))
    report(rankings, again, options.seeds)
    results = {"setting": options.setting, "rankings": rankings, "again": again}
    written = record.write(f"labels-{options.setting}", ["torch", "cleanlab", "scikit-learn"], results)
    print(f"recorded in {written}")


def prepare_digits(data: Path) -> None:
    """Shard them and draw the labels."""
    run_python("tools/shard.py", "digits", str(data), "--name", "digits", "--workers", "0")
    run_python("tools/noise.py", str(data), "--model", "symmetric", "--rate", "0.8", "--name", "sym80")


def train(method: str, seed: int, labels: str, options: argparse.Namespace) -> Path:
    """One run in a process of its own; its directory."""
    run_dir: Path = options.work / labels / f"{method}-{seed}"
    settings = [f"run.dir={run_dir}", f"run.seed={seed}", f"data.root={options.work / 'data'}", "dist.num_threads=1"]
    settings += [f"data.label_set={labels}", "track.enabled=false", *options.settings[method], *options.overrides]
    run_python("-m", "nldist.cli", "train", options.config, *settings, quiet=True)
    print(f"{labels} {method}, seed {seed}: trained", flush=True)
    return run_dir


def ranking(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """How well the audit and cleanlab tell the wrong labels of a run: AUC, and precision at their true number."""
    run_dir: Path = options.work / options.labels / f"{method}-{seed}"
    run_python("-m", "nldist.cli", "audit", str(run_dir), "--images", "100", quiet=True)
    table = run_dir / "train.parquet"
    if not table.exists():
        asked = [str(options.work / "data"), "--split", "train", "--probabilities", "--out", str(table)]
        run_python("-m", "nldist.cli", "predict", str(run_dir), *asked, quiet=True)
    index = Index.open(options.work / "data", "train")
    given, wrong = index.labels(options.labels), index.labels(options.labels) != index.labels("clean")
    audit = pq.read_table(run_dir / "audit" / "labels.parquet", columns=["key", "rank"])
    rank = dict(zip(audit["key"].to_pylist(), audit["rank"].to_pylist(), strict=True))
    doubt = {"audit": -np.array([rank[key] for key in index.keys(range(len(index)))], float)}
    predicted = pq.read_table(table)
    assert predicted["path"].to_pylist() == index.keys(range(len(index)))
    probabilities = predicted["probabilities"].combine_chunks().flatten().to_numpy().reshape(len(given), -1)
    doubt |= cleanlabs(given, probabilities.astype(np.float64))
    scores = {name: measured(wrong, values) for name, values in doubt.items()}
    return {"method": method, "seed": seed, "num_wrong": int(wrong.sum()), "scores": scores}


def cleanlabs(given: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """cleanlab's doubts: its quality scores; and its list of issues, in its order, before all others."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    probabilities = probabilities / probabilities.sum(1, keepdims=True)
    found = {f"cleanlab {name}": -get_label_quality_scores(given, probabilities, method=name) for name in SCORES}
    issues = find_label_issues(given, probabilities, return_indices_ranked_by="self_confidence")
    found["cleanlab find_label_issues"] = found["cleanlab self_confidence"] - 2
    found["cleanlab find_label_issues"][issues] = -np.arange(len(issues)) / len(given)
    return found


def measured(wrong: np.ndarray, doubt: np.ndarray) -> dict[str, float]:
    """AUC, and the share of wrong labels among as many as are wrong."""
    first = np.argsort(-doubt, kind="stable")[: wrong.sum()]
    return {"auc": float(roc_auc_score(wrong, doubt)), "precision": float(wrong[first].mean())}


def train_again(seed: int, labels: str, options: argparse.Namespace) -> dict[str, Any]:
    """Cross-entropy on other labels; its accuracy, beside that on the given ones."""
    data, first = options.work / "data", options.work / options.labels
    index = Index.open(data, "train")
    if labels == "corrected":
        labels = f"corrected-{options.labels}-{seed}"
        if labels not in index.label_sets():
            run = str(first / f"dividemix-{seed}")
            run_python("tools/noise.py", str(data), "--from-run", run, "--name", labels, quiet=True)
    run_dir = train("cross_entropy", seed, labels, options)
    given, other = (
        json.loads((path / "summary.json").read_text()) for path in (first / f"cross_entropy-{seed}", run_dir)
    )
    right = 100 * float((index.labels(labels) == index.labels("clean")).mean())
    last = {"last": other["accuracy"]["last"], "last_given": given["accuracy"]["last"]}
    return {"seed": seed, "labels": labels, "labels_right": right, **last}


def report(rankings: list[dict[str, Any]], again: list[dict[str, Any]], seeds: list[int]) -> None:
    """Print means over the seeds, and the way from given to true labels."""
    for method in METHODS:
        own = [row["scores"] for row in rankings if row["method"] == method]
        print(f"{method}'s run: {rankings[0]['num_wrong']} labels are wrong")
        for name in own[0]:
            auc, precision = ([100 * row[name][key] for row in own] for key in ("auc", "precision"))
            print(f"  {name:38} AUC {statistics.fmean(auc):6.2f}   precision {statistics.fmean(precision):6.2f}")
    for seed in seeds:
        corrected, clean = (row for row in again if row["seed"] == seed)
        given, most = corrected["last_given"], clean["last"]
        share = (corrected["last"] - given) / (most - given)
        print(
            f"cross-entropy, seed {seed}: last {given:.2f} on given, {corrected['last']:.2f} on corrected "
            f"({corrected['labels_right']:.2f} % right), {most:.2f} on true labels: {100 * share:.0f} % of the way"
        )


if __name__ == "__main__":
    sys.exit(main())
