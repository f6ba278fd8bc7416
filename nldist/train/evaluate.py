"""Accuracy of a run's weights on a split, with the confusion between classes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nldist.config import Config
from nldist.data.index import Index
from nldist.data.stream import Batch
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.files import write_text
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.evaluate import EvaluationPass
from nldist.passes.sweep import Output, Sweep
from nldist.report import plots
from nldist.run.classifier import Classifier
from nldist.run.directory import RunDirectory
from nldist.train.run_pass import run_pass


def evaluate(
    run_dir: Path,
    split: str | None = None,
    weights: Literal["last", "best"] = "last",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate weights/WEIGHTS.pt of a run; leaves evaluation-SPLIT-WEIGHTS.json and a plot in the run directory.

    Returns:
        accuracy, accuracy_top5 (percent), of two networks accuracy0 and accuracy1 of each alone, num_evaluated, and
        accuracy by class.

    Raises:
        UserError: no such run, weights or split.
    """
    run = RunDirectory(run_dir)
    config = run.config(overrides)
    with World.start(**config.dist.model_dump()) as world:
        task = _evaluation(run, config, world, split or config.data.eval_split, weights)
        metrics = run_pass(task.context, task)
        confusion = task.confusion.cpu().numpy()
        classes = task.context.evaluation.classes
        totals, hits = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        by_class = [round(100 * hit / total, 3) if total else None for hit, total in zip(hits, totals, strict=True)]
        result = {
            "run": str(run_dir),
            "split": task.context.evaluation.split,
            "weights": weights,
            **metrics,
            "by_class": dict(zip(classes, by_class, strict=True)),
        }
        if world.is_main:
            name = f"{result['split']}-{weights}"
            write_text(run_dir / f"evaluation-{name}.json", json.dumps(result, indent=2) + "\n")
            plots.confusion(run_dir / "plots" / f"confusion-{name}.png", confusion, classes)
        return result


def _evaluation(run: RunDirectory, config: Config, world: World, split: str, weights: str) -> EvaluationPass:
    context = _context(config, world, split)
    return EvaluationPass(context, _classifier(run, weights, context).predictors())


def _context(config: Config, world: World, split: str) -> Context:
    """A context with one split, and its own labels."""
    if not config.data.root.exists():
        raise UserError(f"the run's data set is not in {config.data.root}; if it has moved, add data.root=ITS_PLACE")
    index = Index.open(config.data.root, split, config.data.cache_dir)
    return Context(config, "evaluate", config.recipe, world, Data(index, index, index.label, None))


def _classifier(run: RunDirectory, weights: str, context: Context) -> Classifier:
    saved, root = run.load_weights(weights), context.config.data.root
    if saved["classes"] != context.train.classes:
        raise UserError(f"{run.path} has learnt other classes (or another order of them) than {root} has")
    return Classifier(saved, context.config, context.world.device)


class _Labelling(Sweep):
    """Every image's predicted class."""

    def __init__(self, context: Context, logits: Output) -> None:
        super().__init__(context, f"predict {context.train.split}")
        self._logits = logits
        self.predicted = context.table.add("predicted", torch.int32, fill=-1)

    def see(self, batch: Batch, images: Tensor) -> None:
        """See Sweep."""
        self.predicted[batch.ids] = self._logits(images).argmax(1)


def labels_of(run_dir: Path, weights: Literal["last", "best"], data_root: Path, split: str) -> np.ndarray:
    """The class that a run's networks predict for every image of a split, int32 (N,), on every rank.

    Raises:
        UserError: no such run, weights or split; other classes; or an image that cannot be read.
    """
    run = RunDirectory(run_dir)
    config = run.config([f"data.root={data_root}", "data.on_bad=refuse"])
    with World.start(**config.dist.model_dump()) as world:
        context = _context(config, world, split)
        task = _Labelling(context, _classifier(run, weights, context).logits)
        run_pass(context, task)
        return task.predicted.gather()
