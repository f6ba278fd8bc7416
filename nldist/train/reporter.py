"""What a run leaves for people and scripts: summary, plots, the samples' table, the line of an epoch."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nldist.files import replacing
from nldist.passes.base import Curves, Split
from nldist.passes.context import Context
from nldist.report import plots
from nldist.run.status import clock

LAST_EPOCHS = 10  # "last" of the field's tables: the mean of these (DivideMix's code)
_QUALITY = ("split_auc", "split_precision", "split_recall", "labelled_share")


def split_means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The quality of the division, mean over the networks, from an epoch's metrics."""
    means = {}
    for name in _QUALITY:
        values = [metrics[f"{name}{n}"] for n in (0, 1) if metrics.get(f"{name}{n}") is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means


def summary(stage: str, score: str, context: Context, record: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json holds; accuracies in percent. `score` is the metric of the record's scores."""
    config, quality = context.config, record["quality"]
    measured = [value for value in record["scores"] if not math.isnan(value)]
    last = measured[-LAST_EPOCHS:]
    scores = {"best": max(measured), "last": sum(last) / len(last), "final": measured[-1]} if measured else None
    return {
        "stage": stage,
        "method": config.method.name,
        "data_set": context.train.name,
        "label_set": config.data.label_set,
        "num_samples": len(context.train),
        "model": config.model.name,
        "seed": config.run.seed,
        "world_size": context.world.size,
        "epochs": len(record["scores"]),
        score: scores,
        "split": {name.removeprefix("split_"): quality.get(name) for name in _QUALITY} if quality else None,
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


def loss_histogram(run_dir: Path, context: Context, epoch: int, name: str, split: Split) -> Path | None:
    """Plot a division's losses with its mixture; the path on rank 0. A collective."""
    losses = context.world.all_gather(split.losses)
    if not context.world.is_main:
        return None
    seen = ~np.isnan(losses)
    clean = None if context.clean is None else (context.clean == context.labels)[seen]
    mixture = split.mixture
    path = run_dir / "plots" / f"losses-{name}-epoch{epoch + 1:04d}.png"
    plots.loss_histogram(
        path,
        losses[seen],
        (mixture.means, mixture.variances, mixture.weights) if mixture else None,
        clean_mask=clean,
        tau=context.config.method.dividemix.tau,
        title=f"{context.train.name}, {context.config.data.label_set or 'given labels'}: {name}, epoch {epoch + 1}",
    )
    return path


def score_curve(run_dir: Path, name: str, scores: list[float]) -> Path | None:
    """Plot the score of every epoch that has one; None where fewer than two have."""
    points = [(epoch, score) for epoch, score in enumerate(scores, start=1) if not math.isnan(score)]
    if len(points) < 2:
        return None
    epochs, values = zip(*points, strict=True)
    label = name.replace("_", " ")
    unit = " (%)" if name.endswith("accuracy") else ""
    path = run_dir / "plots" / f"{name}.png"
    plots.curves(path, {run_dir.name: (epochs, values)}, ylabel=f"{label}{unit}", title=f"{label} by epoch")
    return path


def curves(run_dir: Path, name: str, drawing: Curves) -> Path:
    """Plot what a pass has drawn."""
    path = run_dir / "plots" / f"{name}.png"
    plots.curves(path, drawing.lines, ylabel=drawing.ylabel, title=drawing.title, xlabel=drawing.xlabel)
    return path


def sample_columns(context: Context, num_networks: int) -> dict[str, np.ndarray]:
    """Clean probability (mean over the networks) and predictions of every sample, where kept. A collective."""
    names = [f"clean{n}" for n in range(num_networks) if f"clean{n}" in context.table]
    if not names:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a sample that no network has seen stays NaN
        columns = {"clean_probability": np.nanmean([context.table[name].gather() for name in names], axis=0)}
    for number in range(len(names)):
        columns[f"predicted{number}"] = context.table[f"predicted{number}"].gather()
    return columns


def write_samples(path: Path, context: Context, columns: Mapping[str, np.ndarray]) -> None:
    """Write id, key, label and the columns of every training sample: which labels are wrong, and what instead."""
    index = pq.read_table(context.train.root / context.train.split / "index.parquet", columns=["id", "key"])
    table = index.append_column("label", pa.array(context.labels))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    with replacing(path) as aside:
        pq.write_table(table, aside)
