"""How many of LEND's diluted labels are right, by epoch: against the noisy labels and the network's own predictions.

    python benchmarks/lend.py sym40            # 5,000 real CIFAR-10 images, 40 % of the labels drawn at random
    python benchmarks/lend.py sym80 --seeds 0
    python benchmarks/lend.py worst            # CIFAR-10N "worst": real human labels, 40 % wrong

The paper's claim is that diluted labels are more often right than both early in training. Both profiles, each with its
own network; network, rate and schedule are those of benchmarks/cifar5k.yaml, on one rank. Predictions are those of the
forward that gave the features (random view, batch norm of the batch), and those after the epoch (fixed view). Needs
what benchmarks/cifar.py needs. Runs that are done are not trained again; a run that was cut short goes on. Leaves
benchmarks/results/lend-LABELS-DATE.json and .png.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import record
import torch
from cifar import prepare
from torch import Tensor

from nldist.config.file import load_config
from nldist.dist.engine import Engine
from nldist.errors import UserError, main_guard
from nldist.methods import lend
from nldist.passes.base import Metrics, Pass
from nldist.passes.context import Context
from nldist.passes.supervised import Step
from nldist.passes.sweep import LossSweep
from nldist.report import plots
from nldist.train.stages import train

# Metrics of an epoch, and what the curves are called.
CURVES = {
    "diluted_accuracy": "diluted labels",
    "given_accuracy": "noisy labels",
    "step_accuracy": "own predictions, same forward",
    "sweep_accuracy": "own predictions, after the epoch",
}
PROFILES = ("code", "paper")
# K = 3 is the released code's default. With more neighbours its graph of a small network's features, which are all
# positive, is connected (docs/lend.md).
SETTINGS = ["method.name=lend", "method.lend.k=3", "train.batch_size=128"]


class Watched(lend.Lend):
    """LEND, which also counts how many of the network's own predictions for the training images are right."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.predicted = context.table.add("predicted_in_step", torch.int16, fill=-1)
        LossSweep.add_columns(context, "")

    def _passes(self, epoch: int) -> list[Pass]:
        return [*super()._passes(epoch), LossSweep(self.context, {"": self.logits}, self._count)]

    def loss(self, engine: Engine, step: Step) -> Mapping[str, Tensor]:
        """See Lend."""
        listener = Listener(engine)
        values = super().loss(cast(Engine, listener), step)
        self.predicted[step.ids] = listener.logits.argmax(1)
        return values

    def _count(self, sweep: LossSweep) -> Metrics:
        context, clean = self.context, self.context.clean
        assert clean is not None
        found = {
            "given_accuracy": context.labels,
            "step_accuracy": self.predicted.numpy(),
            "sweep_accuracy": context.table["suggested"].numpy(),
        }
        return {name: 100 * float((labels == clean).mean()) for name, labels in found.items()}


class Listener:
    """An engine's forward, whose logits are kept."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def forward(self, *calls: Any) -> list[Tensor]:
        """See Engine."""
        outputs = self._engine.forward(*calls)
        self.logits = outputs[0].detach()
        return outputs


lend.Lend = Watched  # type: ignore[misc]


@main_guard
def main() -> None:
    """Train what has not been trained yet, print, draw and record the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", help="worst, or symPERCENT")
    parser.add_argument("--source", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--num-train", type=int, default=5000, help="training images")
    parser.add_argument("--work", type=Path, help="default: runs/lendNUM_TRAIN")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=PROFILES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all runs")
    options = parser.parse_intermixed_args()
    if not re.fullmatch(r"worst|sym\d+", options.labels):
        raise UserError(f"labels={options.labels} is neither worst nor such as sym40")
    options.work = options.work or Path(f"runs/lend{options.num_train}")
    prepare(options, options.num_train, num_test=2000)
    rows = [run(profile, seed, options) for profile in options.profiles for seed in options.seeds]
    for profile in options.profiles:
        report(profile, [row for row in rows if row["profile"] == profile])
    results = {"labels": options.labels, "num_train": options.num_train, "runs": rows}
    path = record.write(f"lend-{options.labels}-{options.num_train}", ["torch", "torchvision"], results)
    draw(path.with_suffix(".png"), f"LEND, {options.num_train:,} CIFAR-10 images, labels {options.labels}", rows)
    print(f"recorded in {path}")


def run(profile: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run in this process; its summary, and the curves by name."""
    directory: Path = options.work / options.labels / f"{profile}-{seed}"
    settings = [f"run.dir={directory}", f"run.seed={seed}", f"data.root={options.work / 'data'}"]
    settings += [f"data.label_set={options.labels}", f"method.lend.profile={profile}", *SETTINGS, *options.overrides]
    if code := train(load_config(Path(__file__).with_name("cifar5k.yaml"), settings)):
        sys.exit(code)  # stopped; all is saved
    summary: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    curves = {name: [line[name] for line in lines if line["kind"] == "epoch"] for name in CURVES}
    return {"profile": profile, "seed": seed, "curves": curves, **summary}


def means(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The curves (epochs,), as means over the seeds."""
    return {name: np.mean([row["curves"][name] for row in rows], axis=0) for name in CURVES}


def report(profile: str, rows: list[dict[str, Any]]) -> None:
    """Print the curves at some epochs, and in which epochs the diluted labels are ahead on every seed."""
    curves = means(rows)
    num_epochs = len(curves["diluted_accuracy"])
    shown = sorted({1, 2, 3, 5, 10, 20, 40, num_epochs} & set(range(1, num_epochs + 1)))
    print(f"profile={profile}, mean of {len(rows)} seed(s); % right after epoch " + " ".join(f"{e:6}" for e in shown))
    for name, title in CURVES.items():
        print(f"  {title:34}" + " ".join(f"{curves[name][epoch - 1]:6.2f}" for epoch in shown))
    for name in list(CURVES)[1:]:
        ahead = np.all([np.greater(row["curves"]["diluted_accuracy"], row["curves"][name]) for row in rows], axis=0)
        print(f"  ahead of {CURVES[name]} on every seed in epochs {ranges(np.flatnonzero(ahead) + 1)}")


def ranges(epochs: np.ndarray) -> str:
    """Ascending numbers as "1-4, 7"."""
    runs = np.split(epochs, np.flatnonzero(np.diff(epochs) > 1) + 1)
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs if len(r)) or "none"


def draw(path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """The curves of each profile, as means over the seeds."""
    series = {}
    for profile in dict.fromkeys(row["profile"] for row in rows):
        for name, values in means([row for row in rows if row["profile"] == profile]).items():
            series[f"{profile}: {CURVES[name]}"] = (np.arange(1, len(values) + 1), values)
    plots.curves(path, series, "% right of the training labels", title)


if __name__ == "__main__":
    sys.exit(main())
