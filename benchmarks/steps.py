"""What a step of a method costs beside the plain step that is in it, side by side, on this machine.

    python benchmarks/steps.py [--model preact_resnet18] [--batch-size 64] [--steps 15] [CASE ...]

    sanm: SANM's, half a batch labelled and half not, beside DivideMix's; by rows 54/18 = 3 times (docs/sanm.md)
    lend, lend_paper: LEND's beside cross-entropy's
    mixnn: synthetic samples, neighbours in the batch, soft labels moving, beside cross-entropy's after one forward
        without gradient, which MixNN's features and predictions are of
    selc1000: SELC's, rows of 1,000 soft labels read, moved and written, beside cross-entropy's with as many classes

All train on scikit-learn's digits, enlarged to 32 x 32 pixels; for the last one they are in 1,000 classes. Steps of
both alternate, on one thread; reading is not counted. Leaves benchmarks/results/steps-DATE.json.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import record
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from nldist.cli import main as nldist
from nldist.config.file import load_config
from nldist.dist.engine import Engine
from nldist.dist.world import World
from nldist.errors import main_guard
from nldist.methods.build import build_method
from nldist.methods.cross_entropy import cross_entropy
from nldist.methods.dividemix import DivideMix
from nldist.passes.base import Pass
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.method import Method
from nldist.passes.supervised import Step, SupervisedPass

_CROP = "{op: resize, size: 32}, {op: pad_crop, size: 32, padding: 4}"
SETTINGS = (
    *("train.epochs=4", "data.num_workers=0", "data.label_set=null"),
    *(f"views.train=[{_CROP}]", f"views.strong=[{_CROP}]", "views.eval=[{op: resize, size: 32}]"),
)
DIVIDEMIX = ("method.name=dividemix", "method.dividemix.warmup_epochs=0")
CROSS_ENTROPY = ("method.name=cross_entropy",)
WARM_UP = 3


def last_pass(method: Method) -> Pass:
    """Of the second epoch."""
    (phase,) = (phase for phase in method.phases() if phase.num_epochs)
    return phase.passes(1)[-1]


def divided(method: Method) -> Pass:
    """The semi-supervised pass of network 0, after some division."""
    assert isinstance(method, DivideMix)
    for number in (0, 1):
        clean = np.random.default_rng(number).random(len(method.context.train))
        method.context.table[f"clean{number}"].numpy()[:] = clean
    return method.ssl(method, 0, 1)


def after_a_forward(method: Method) -> Pass:
    """Cross-entropy's after a forward without gradient."""

    def loss(engine: Engine, step: Step) -> Mapping[str, Tensor]:
        engine.predict((step.images, "features", "classify"))
        return cross_entropy(engine, step)

    return SupervisedPass(method.context, 0, method.engines[0], 1, loss)


@dataclass(frozen=True)
class Case:
    """Two steps: settings and pass of the method, and of what is beside it."""

    step: tuple[str, ...]
    beside: tuple[str, ...] = CROSS_ENTROPY
    step_pass: Callable[[Method], Pass] = last_pass
    beside_pass: Callable[[Method], Pass] = last_pass
    num_classes: int = 10


_MIXNN = ("method.name=mixnn", "method.mixnn.warmup_epochs=0", "method.mixnn.turning_epoch=0")
CASES = {
    "sanm": Case((*DIVIDEMIX, "method.ssl=sanm"), DIVIDEMIX, divided, divided),
    "lend": Case(("method.name=lend",)),
    "lend_paper": Case(("method.name=lend", "method.lend.profile=paper", "method.lend.k=8")),
    "mixnn": Case((*_MIXNN, "method.mixnn.update_every=1"), beside_pass=after_a_forward),
    "selc1000": Case(("method.name=selc", "method.selc.turning_epoch=0"), num_classes=1000),
}


@main_guard
def main() -> None:
    """Time the steps, print and record the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15, help="of each, after the warm-up")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.cases:
            case = CASES[name]
            data = digits(Path(folder), case.num_classes)
            common = (
                *SETTINGS,
                f"data.root={data}",
                f"model.name={options.model}",
                f"train.batch_size={options.batch_size}",
            )
            runs = [seconds((*common, *case.step), case.step_pass), seconds((*common, *case.beside), case.beside_pass)]
            pairs = [[next(run) for run in runs] for _ in range(WARM_UP + options.steps)][WARM_UP:]
            step, beside = (statistics.median(values) for values in zip(*pairs, strict=True))
            ratio = statistics.median(one / other for one, other in pairs)
            print(f"{name:11} step {step:.4f} s, beside it {beside:.4f} s: {ratio:.3f} times", flush=True)
            found[name] = {"step": step, "beside": beside, "ratio": ratio, "seconds": pairs}
    facts = {"model": options.model, "batch_size": options.batch_size, "cases": found}
    print(record.write("steps", ["torch", "torchvision"], facts))


def digits(folder: Path, num_classes: int) -> Path:
    """The digits as shards below `folder`, in so many classes: the image's number modulo that."""
    data = folder / f"data{num_classes}"
    if data.exists():
        return data
    if num_classes == 10:
        nldist(["shard", "digits", str(data)])
        return data
    for number, image in enumerate(load_digits().images):
        path = folder / "raw" / f"c{number % num_classes:04}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).convert("RGB").save(path)
    for split in ("train", "test"):
        nldist(["shard", "folder", str(folder / "raw"), str(data), "--split", split])
    return data


def seconds(settings: tuple[str, ...], make: Callable[[Method], Pass]) -> Iterator[float]:
    """Train in a pass; yields the seconds that each step took."""
    config = load_config(Path(__file__).parent.parent / "tests" / "digits.yaml", settings)
    method = build_method(Context(config, "train", config.recipe, World.single(), Data.open(config.data)))
    while True:
        task = make(method)
        plan = task.plan()
        task.start(plan.num_steps, 0)
        for step, batches in enumerate(method.context.stream("train", plan)):
            began = time.perf_counter()
            task.step(batches, step)
            yield time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
