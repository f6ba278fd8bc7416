"""What summary.json holds, and the lines that tell of an epoch and of the end."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nldist.run.status import clock

LAST_EPOCHS = 10  # "last" of the field's tables: the mean of these (DivideMix's code)
_FURTHER = re.compile(r"(test_)?accuracy(_top5|\d+)|test_accuracy")
_QUALITY = ("split_auc", "split_precision", "split_recall", "labelled_share")


def quality(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The quality of the division, mean over the networks, from an epoch's metrics."""
    means = {}
    for name in _QUALITY:
        values = [value for key, value in metrics.items() if key.rstrip("0123456789") == name and value is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means


def measured(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The further accuracies among an epoch's metrics: top-5, of each network alone, on the test split."""
    return {name: value for name, value in metrics.items() if _FURTHER.fullmatch(name)}


def summarise(score: str, record: Mapping[str, Any], test_split: str | None) -> dict[str, Any]:
    """What a run's record comes to; accuracies in percent. `score` is the metric of its scores."""
    split = record["quality"]
    top5 = _over_epochs(record["measured"].get("accuracy_top5", []))
    return {
        "epochs": len(record["scores"]),
        score: _over_epochs(record["scores"]),
        **({"accuracy_top5": top5} if top5 else {}),
        **(_on_test(test_split, record) if record["chosen"] else {}),
        "split": {name.removeprefix("split_"): split.get(name) for name in _QUALITY} if split else None,
        "num_bad_records": record["num_bad"],
        "seconds": record["seconds"],
        "images_per_second": record["train_images"] / max(record["train_seconds"], 1e-9),
    }


def _on_test(split: str | None, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the test split says: by epoch as the evaluation split, and `chosen`, of weights/best.pt at the end."""
    found = {name: _over_epochs(record["measured"].get(f"test_{name}", [])) for name in ("accuracy", "accuracy_top5")}
    chosen = {name.removeprefix("test_"): value for name, value in record["chosen"].items()}
    by_epoch = {name: values for name, values in found.items() if values}
    return {"test": {"split": split, **by_epoch, "chosen": chosen}}


def _over_epochs(values: Iterable[float]) -> dict[str, float] | None:
    """Of a value by epoch: the best, the mean of the last ones, the last; None where none was measured."""
    known = [value for value in values if not math.isnan(value)]
    last = known[-LAST_EPOCHS:]
    return {"best": max(known), "last": sum(last) / len(last), "final": known[-1]} if known else None


def epoch_line(
    title: str, score: str, metrics: Mapping[str, Any], record: Mapping[str, Any], seconds: float, left: float
) -> str:
    """One line on a finished epoch that took `seconds`, with `left` to go at that pace."""
    parts = [f"{title} {metrics['phase']}"]
    if score in metrics:
        best = np.nanmax(record["scores"])
        parts.append(f"{score.replace('_', ' ')} {_number(metrics[score])} (best {_number(best)})")
    parts += [f"{name} {value:.4g}" for name, value in metrics.items() if name.endswith("/loss")]
    parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in record["quality"].items()]
    return "  ".join([*parts, f"{clock(seconds)}, {clock(left)} left at this pace"])


def closing_line(run_dir: Path, summary: Mapping[str, Any]) -> str:
    """One line on a finished stage."""
    parts = [f"{'' if summary['stage'] == 'train' else summary['stage'] + ' '}done in {clock(summary['seconds'])},"]
    for name in ("accuracy", "knn_accuracy"):
        if summary.get(name):
            best, last = summary[name]["best"], summary[name]["last"]
            parts.append(f"{name.replace('_', ' ')} best {best:.2f}, last {last:.2f} (mean of the last epochs),")
    if test := summary.get("test"):
        parts.append(f"{test['chosen']['accuracy']:.2f} on {test['split']} (weights/best.pt),")
    if summary["images_per_second"]:
        parts.append(f"{summary['images_per_second']:,.0f} img/s,")
    return " ".join([*parts, f"{run_dir}/summary.json"])


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
