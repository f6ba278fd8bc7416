"""What a run leaves for people and scripts: summary, plots, the samples' table, the line of an epoch."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nldist import plots
from nldist.config import Config
from nldist.methods.base import Context, Split
from nldist.progress import clock

LAST_EPOCHS = 10  # "last" of the field's tables: the mean of these (algorithms 0.3)
_QUALITY = ("split_auc", "split_precision", "split_recall", "labelled_share")


def split_means(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The quality of the division, mean over the networks, from an epoch's metrics."""
    means = {}
    for name in _QUALITY:
        values = [metrics[f"{name}{n}"] for n in (0, 1) if metrics.get(f"{name}{n}") is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means


def summary(config: Config, context: Context, record: Mapping[str, Any]) -> dict[str, Any]:
    """What summary.json holds; accuracies in percent."""
    accuracies, quality = record["accuracies"], record["quality"]
    last = accuracies[-LAST_EPOCHS:]
    return {
        "method": config.method.name,
        "data_set": context.train.name,
        "label_set": config.data.label_set,
        "num_samples": len(context.train),
        "model": config.model.name,
        "seed": config.run.seed,
        "world_size": context.world.size,
        "epochs": len(accuracies),
        "accuracy": {"best": max(accuracies), "last": sum(last) / len(last), "final": accuracies[-1]},
        "split": {name.removeprefix("split_"): quality.get(name) for name in _QUALITY} if quality else None,
        "num_bad_records": record["num_bad"],
        "seconds": record["seconds"],
        "images_per_second": record["train_images"] / max(record["train_seconds"], 1e-9),
    }


def epoch_line(
    epoch: int, num_epochs: int, metrics: Mapping[str, Any], record: Mapping[str, Any], seconds: float
) -> str:
    """One line on a finished epoch."""
    parts = [
        f"epoch {epoch}/{num_epochs} {metrics['phase']}",
        f"accuracy {metrics['accuracy']:.2f} (best {max(record['accuracies']):.2f})",
    ]
    parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in record["quality"].items()]
    parts.append(f"{clock(seconds)}, {clock(seconds * (num_epochs - epoch))} left at this pace")
    return "  ".join(parts)


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


def accuracy_curve(run_dir: Path, accuracies: list[float]) -> Path:
    """Plot the accuracy of every epoch."""
    path = run_dir / "plots" / "accuracy.png"
    epochs = list(range(1, len(accuracies) + 1))
    plots.curves(path, {run_dir.name: (epochs, accuracies)}, ylabel="accuracy (%)", title="accuracy by epoch")
    return path


def sample_columns(context: Context, num_networks: int) -> dict[str, np.ndarray]:
    """Clean probability (mean over the networks) and predictions of every sample, where kept. A collective."""
    names = [f"clean{n}" for n in range(num_networks) if f"clean{n}" in context.table]
    if not names:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a sample that no network has seen stays NaN
        columns = {"clean_probability": np.nanmean([context.table.gather(name) for name in names], axis=0)}
    for number in range(len(names)):
        columns[f"predicted{number}"] = context.table.gather(f"predicted{number}")
    return columns


def write_samples(path: Path, context: Context, columns: Mapping[str, np.ndarray]) -> None:
    """Write id, key, label and the columns of every training sample: which labels are wrong, and what instead."""
    index = pq.read_table(context.train.root / context.train.split / "index.parquet", columns=["id", "key"])
    table = index.append_column("label", pa.array(context.labels))
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    aside = path.with_suffix(".part")
    pq.write_table(table, aside)
    aside.replace(path)
