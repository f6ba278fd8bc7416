"""Time `nldist predict` against the evaluation pass over the same images, taking turns.

    OMP_NUM_THREADS=1 python benchmarks/predict.py

The images are those of benchmarks/input.py (about 30 kB, short side 256), the network is timm's lcnet_050 with random
weights at 224 pixels: small, so that what surrounds it shows. Each turn starts two workers and ends them:

    evaluation pass   `EvaluationPass` over the split, as in training and in `nldist evaluate`
    predict           the table of the split in Parquet: labels and their probabilities
    predict, all      the same with the probabilities of all 1,000 classes
    predict, files    the same table for the image files

The times of predict include reading the weights, finding the images and writing the table.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from input import measure, prepare

from nldist.config import Config
from nldist.config.file import parse_config
from nldist.data.index import Index
from nldist.dist.memory import keep_freed_memory
from nldist.dist.world import World
from nldist.models import build_model
from nldist.passes.context import Context
from nldist.passes.data import Data
from nldist.passes.evaluate import EvaluationPass
from nldist.run.classifier import Classifier
from nldist.run.directory import RunDirectory
from nldist.train.predict import Request, predict
from nldist.train.run_pass import run_pass

MODEL, NUM_CLASSES, TARGET = "lcnet_050", 1_000, 0.9
CONFIG = f"""
data: {{root: DATA, eval_split: train, num_workers: 2}}
views: {{train: [{{op: center_crop, size: 224}}], eval: [{{op: center_crop, size: 224}}]}}
model: {{name: {MODEL}}}
train: {{epochs: 1, batch_size: 64}}
method: {{name: cross_entropy}}
"""


def make_run(directory: Path, index: Index) -> Config:
    """A run directory with random weights."""
    config = parse_config(CONFIG.replace("DATA", str(index.root)), "benchmark")
    run, state = RunDirectory(directory), build_model(MODEL, NUM_CLASSES).classifier_state()
    (directory / "weights").mkdir(parents=True, exist_ok=True)
    run.write_config(config)
    classes = [f"class{number}" for number in range(NUM_CLASSES)]
    run.save_weights("last", [state], {"stage": "train", "model": MODEL, "classes": classes})
    return config


def evaluation_pass(run_dir: Path, config: Config, index: Index) -> None:
    """An evaluation of the split."""
    world, saved = World.single(), RunDirectory(run_dir).load_weights("last")
    index.classes = saved["classes"]  # a matrix of confusion for all of them
    context = Context(config, "evaluate", config.recipe, world, Data(index, index, index.label, None))
    run_pass(context, EvaluationPass(context, Classifier(saved, config, world.device).predictors()))


def table(run_dir: Path, out: Path, **what: Any) -> None:
    """A table of predictions."""
    out.unlink(missing_ok=True)
    predict(Request(run_dir, out=out, overrides=["dist.device=cpu", "dist.num_threads=1"], **what))


def main() -> None:
    """Measure, print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "nldist-benchmark-input")
    parser.add_argument("--num-images", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    args = parser.parse_args()
    args.work_dir /= str(args.num_images)
    keep_freed_memory()
    torch.set_num_threads(1)
    index, run_dir = prepare(args.work_dir, args.num_images), args.work_dir / "run"
    config, out = make_run(run_dir, index), args.work_dir / "out.parquet"
    contestants: dict[str, Callable[[], None]] = {
        "evaluation pass": lambda: evaluation_pass(run_dir, config, index),
        "predict": lambda: table(run_dir, out),
        "predict, all": lambda: table(run_dir, out, probabilities=True),
        "predict, files": lambda: table(run_dir, out, images=[str(args.work_dir / "files")]),
    }
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(args.repeats):
        for name, turn in contestants.items():
            turns[name].append(measure(turn, len(index)))
    report(args, len(index), turns)


def report(args: argparse.Namespace, num_images: int, turns: dict[str, list[tuple[float, float]]]) -> None:
    """Print medians and ratios, and write them to a dated file."""
    rates = {name: [median(column) for column in zip(*pairs, strict=True)] for name, pairs in turns.items()}
    print(f"{'images per second':20}{'wall':>10}{'CPU':>10}{'of the pass':>14}")
    for name, (wall, cpu) in rates.items():
        print(f"{name:20}{wall:10.0f}{cpu:10.0f}{wall / rates['evaluation pass'][0]:14.2f}")
    ratio = rates["predict"][0] / rates["evaluation pass"][0]
    print(f"predict / evaluation pass: {ratio:.2f}, target {TARGET}")
    results = {
        "num_images": num_images,
        "model": MODEL,
        "images_per_second": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in rates.items()},
        "turns": turns,
        "ratio": ratio,
        "target": TARGET,
    }
    print(f"written to {record.write('predict', ['torch', 'torchvision', 'simplejpeg', 'timm', 'pyarrow'], results)}")


if __name__ == "__main__":
    main()
