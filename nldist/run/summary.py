"""What summary.json holds, and the lines that tell of an epoch and of the end."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nldist.run.status import clock

LAST_EPOCHS = 10  # "last" of the field's tables: the mean of these (DivideMix's code)
_QUALITY = ("split_auc", "split_precision", "split_recall", "labelled_share")


def quality(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The quality of the division, mean over the networks, from an epoch's metrics."""
    means = {}
    for name in _QUALITY:
        values = [value for key, value in metrics.items() if key.rstrip("0123456789") == name and value is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means


def summarise(score: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's record comes to; accuracies in percent. `score` is the metric of its scores."""
    split = record["quality"]
    measured = [value for value in record["scores"] if not math.isnan(value)]
    last = measured[-LAST_EPOCHS:]
    scores = {"best": max(measured), "last": sum(last) / len(last), "final": measured[-1]} if measured else None
    return {
        "epochs": len(record["scores"]),
        score: scores,
        "split": {name.removeprefix("split_"): split.get(name) for name in _QUALITY} if split else None,
        "num_bad_records": record["num_bad"],
        "seconds": record["seconds"],
        "images_per_second": record["train_images"] / max(record["train_seconds"], 1e-9),
    }


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
    if summary["images_per_second"]:
        parts.append(f"{summary['images_per_second']:,.0f} img/s,")
    return " ".join([*parts, f"{run_dir}/summary.json"])


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
