"""Accuracy of a run's weights on a split, with the confusion between classes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from nldist.config import Config
from nldist.data.index import Index
from nldist.dist.table import SampleTable
from nldist.dist.world import World
from nldist.files import write_text
from nldist.passes.context import Context
from nldist.passes.evaluate import EvaluationPass
from nldist.report import plots
from nldist.run.directory import RunDirectory, ensemble
from nldist.train.meter import Watch


def evaluate(
    run_dir: Path,
    split: str | None = None,
    weights: Literal["last", "best"] = "last",
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluate weights/WEIGHTS.pt of a run; leaves evaluation-SPLIT-WEIGHTS.json and a plot in the run directory.

    Returns:
        accuracy, accuracy_top5 (percent), num_evaluated, and accuracy by class.

    Raises:
        UserError: no such run, weights or split.
    """
    run = RunDirectory(run_dir)
    config = run.config(overrides)
    with World.start(**config.dist.model_dump()) as world:
        task = _evaluation(run, config, world, split or config.data.eval_split, weights)
        metrics = task.finish()
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
    """An evaluation pass with all its steps done."""
    context = _evaluation_context(config, world, split)
    networks = [network.to(world.device) for network in run.load_networks(weights, config, context.train.classes)]
    task = EvaluationPass(context, lambda images: ensemble(networks, images))
    plan = task.plan()
    task.start(plan.num_steps, 0)
    for step, batches in enumerate(context.stream("evaluation", plan)):
        task.step(batches, step)
    return task


def _evaluation_context(config: Config, world: World, split: str) -> Context:
    """A context with one split, and its own labels."""
    index = Index.open(config.data.root, split, config.data.cache_dir)
    return Context(config, world, index, index, index.label, None, SampleTable(len(index), world))


@torch.no_grad()
def predict(run_dir: Path, weights: Literal["last", "best"], data_root: Path, split: str) -> np.ndarray:
    """The class that a run's networks predict for every image of a split, int32 (N,), on every rank.

    Raises:
        UserError: no such run, weights or split; other classes; or an image that cannot be read.
    """
    run = RunDirectory(run_dir)
    config = run.config([f"data.root={data_root}", "data.on_bad=refuse"])
    with World.start(**config.dist.model_dump()) as world:
        context = _evaluation_context(config, world, split)
        networks = [network.to(world.device) for network in run.load_networks(weights, config, context.train.classes)]
        predicted = context.table.add("predicted", torch.int32, fill=-1)
        plan = context.sweep(len(context.train))
        watch = Watch(f"{split} predict", plan.num_steps, 0, config.track.every_seconds)
        stream = context.stream("evaluation", plan)
        for step, batches in enumerate(stream):
            batch = batches["all"]
            if not len(batch.ids):
                continue
            logits = ensemble(networks, context.fixed_view(batch))
            predicted[batch.ids] = logits.argmax(1)
            if watch.due() and world.is_main:
                print(watch.line(step + 1, watch.rates(stream.num_images, stream.wait_seconds), {}), flush=True)
        return predicted.gather()
