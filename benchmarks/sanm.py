"""What a step of SANM costs beside one of DivideMix at the same batch size, side by side, on this machine.

    python benchmarks/sanm.py [--model preact_resnet18] [--steps 7]

Both train on scikit-learn's digits, enlarged to 32 x 32 pixels, from the same division; steps alternate, reading
included. By rows a step of the published design costs 54/18 = 3 times DivideMix's (docs/sanm.md). Leaves
benchmarks/results/sanm-DATE.json.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import record

from nldist.cli import main as nldist
from nldist.config.file import load_config
from nldist.dist.world import World
from nldist.errors import main_guard
from nldist.methods.dividemix import DivideMix
from nldist.passes.context import Context
from nldist.passes.data import Data

_CROP = "{op: resize, size: 32}, {op: pad_crop, size: 32, padding: 4}"
SETTINGS = (
    *("method.name=dividemix", "method.dividemix.warmup_epochs=0", "train.epochs=4", "data.num_workers=0"),
    *(f"views.train=[{_CROP}]", f"views.strong=[{_CROP}]", "views.eval=[{op: resize, size: 32}]"),
)
WARM_UP = 2


@main_guard
def main() -> None:
    """Time the steps, print and record the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preact_resnet18")
    parser.add_argument("--batch-size", type=int, default=64, help="labelled and unlabelled images of a step together")
    parser.add_argument("--steps", type=int, default=7, help="of each, after the warm-up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        nldist(["shard", "digits", str(data)])
        runs = {ssl: steps(ssl, data, options.model, options.batch_size) for ssl in ("mixmatch", "sanm")}
        seconds: dict[str, list[float]] = {ssl: [] for ssl in runs}
        for _ in range(WARM_UP + options.steps):
            for ssl, run in runs.items():
                seconds[ssl].append(next(run))
    medians = {ssl: statistics.median(values[WARM_UP:]) for ssl, values in seconds.items()}
    ratio = medians["sanm"] / medians["mixmatch"]
    print(f"step of DivideMix {medians['mixmatch']:.3f} s, of SANM {medians['sanm']:.3f} s: {ratio:.2f} times")
    facts = {"model": options.model, "batch_size": options.batch_size, "seconds": seconds, "medians": medians}
    print(record.write("sanm", ["torch"], facts | {"ratio": ratio}))


def steps(ssl: str, data: Path, model: str, batch_size: int) -> Iterator[float]:
    """Train network 0; yields the seconds that each step took."""
    settings = [*SETTINGS, f"data.root={data}", f"model.name={model}", f"method.ssl={ssl}"]
    settings += ["data.label_set=null", f"train.batch_size={batch_size}"]
    config = load_config(Path(__file__).parent.parent / "tests" / "digits.yaml", settings)
    method = DivideMix(Context(config, "train", config.recipe, World.single(), Data.open(config.data)))
    for number in (0, 1):
        clean = np.random.default_rng(number).random(len(method.context.train))
        method.context.table[f"clean{number}"].numpy()[:] = clean
    task = method.ssl(method, 0, 1)
    plan = task.plan()
    task.start(plan.num_steps, 0)
    began = time.perf_counter()
    for step, batches in enumerate(method.context.stream("train", plan)):
        task.step(batches, step)
        yield time.perf_counter() - began
        began = time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
