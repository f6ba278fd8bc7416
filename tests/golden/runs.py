"""Seeded runs on the digits, and the losses of each of their steps: what a change of code must leave as it is."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from nldist.data.views import View
from tests.jobs import output, run_job

FOLDER = Path(__file__).parent
DIVIDE = ("method.name=dividemix", "train.epochs=4", "method.dividemix.warmup_epochs=2")
MIXNN = (
    *("method.name=mixnn", "train.epochs=5", "method.mixnn.warmup_epochs=1", "method.mixnn.turning_epoch=3"),
    "method.mixnn.update_every=2",
)
RUNS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("method.name=cross_entropy", "train.epochs=3"),
    "mixup": ("method.name=mixup", "train.epochs=3"),
    "dividemix": (*DIVIDE, "method.dividemix.rampup_epochs=2", "method.dividemix.peers=sequential"),
    "dividemix_real": (
        *(*DIVIDE, "method.dividemix.form=real", "method.dividemix.subset=700", "method.dividemix.warmup_penalty=true"),
        *("method.mixture.history=3", "train.ema_decay=0.9", "optim.accumulate=2"),
    ),
    "sanm": (*DIVIDE, "method.ssl=sanm", "train.epochs=3", "method.sanm.ratio_low=0.1", "method.sanm.ratio_high=0.3"),
    "elr": ("method.name=elr", "train.epochs=3"),
    "co_teaching": (
        *("method.name=co_teaching", "train.epochs=3", "optim.schedule=linear", "optim.milestones=[1]"),
        *("method.co_teaching.forget_rate=0.5", "method.co_teaching.gradual_epochs=2"),
    ),
    "co_teaching_plus": (
        *("method.name=co_teaching_plus", "train.epochs=3", "method.co_teaching_plus.warmup_epochs=1"),
        *("method.co_teaching.forget_rate=0.5", "method.co_teaching.gradual_epochs=2"),
    ),
    "forward": ("method.name=forward", "train.epochs=2", "method.forward.estimate_epochs=2"),
    "pencil": (
        *("method.name=pencil", "train.epochs=4", "method.pencil.warmup_epochs=1"),
        *("method.pencil.correction_epochs=2", "method.pencil.label_lr=2000", "method.pencil.finetune_lr=0.04"),
    ),
    "m_correction": ("method.name=m_correction", "train.epochs=4", "method.m_correction.warmup_epochs=2"),
    "scanmix": ("method.name=scanmix", "train.epochs=4", "method.dividemix.warmup_epochs=2"),
    "lend": ("method.name=lend", "train.epochs=3", "method.lend.history_from=1"),
    "lend_paper": (
        *("method.name=lend", "train.epochs=3", "method.lend.profile=paper"),
        *("method.lend.beta=0.4", "method.lend.graph=all_ranks", "method.soft_dtype=float16"),
    ),
    "mixnn": (*MIXNN, "method.mixture.history=2", "optim.restart_epochs=2"),
    "mixnn_data_set": (*MIXNN, "method.mixnn.neighbours=data_set", "method.mixnn.k=3"),
    "selc": ("method.name=selc", "train.epochs=3", "method.selc.turning_epoch=1"),
}
SIZES = (1, 2)
# Each step is reported. What measures the machine is not in the record, nor what shows elsewhere: the rate in the
# losses, each network's accuracy in that of both.
REPORTED = ("track.every_seconds=1e-9", "train.batch_size=128", "train.eval_batch_size=256")
_OTHER = (
    "images_per_second",
    "data_wait_share",
    "sent_mib",
    "gpu_memory_gib",
    "learning_rate",
    "accuracy0",
    "accuracy1",
)

# "STAGE epoch E NAME" -> the values of its steps, in order; of an epoch's own metrics one value.
Losses = dict[str, list[float]]


def in_float64() -> None:
    """Networks and images of this process: processors then agree to many digits, and so do all decisions."""
    torch.set_default_dtype(torch.float64)
    make = View.__call__
    View.__call__ = lambda *args: make(*args).double()  # type: ignore[method-assign]


def run(name: str, size: int, data: Path, folder: Path) -> Losses:
    """Train the run `name` on `size` ranks below `folder`; the losses by step, as rank 0 reports them."""
    run_dir = folder / f"{name}-{size}"
    codes = run_job(run_dir, f"data.root={data}", *RUNS[name], *REPORTED, world_size=size, prepare=in_float64)
    if codes != [0] * size:
        raise RuntimeError(f"{name} on {size} rank(s) ended with {codes}:\n{output(run_dir)[-2000:]}")
    losses: Losses = {}
    for stage in (*sorted(run_dir.glob("stages/*"), key=lambda path: path.stat().st_ctime), run_dir):
        label = stage.name.partition("-")[0] if stage != run_dir else "train"
        losses |= _losses(label, stage / "metrics.jsonl")
    return losses


def _losses(stage: str, file: Path) -> Losses:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    losses: Losses = {}
    for (kind, epoch), group in groupby(lines, lambda line: (line["kind"], line["epoch"])):
        for line in group:
            for key, value in line.items():
                if isinstance(value, float) and key != "time" and not key.endswith(_OTHER):
                    losses.setdefault(
                        f"{stage} epoch {epoch} {key}" + (" (end)" if kind == "epoch" else ""), []
                    ).append(value)
    return {key: list(_by_step(values)) if "/step_" in key else values for key, values in losses.items()}


def _by_step(means: list[float]) -> Iterator[float]:
    """The values whose running means these are."""
    total = 0.0
    for count, mean in enumerate(means, start=1):
        yield mean * count - total
        total = mean * count


def first_difference(got: Losses, want: Losses, tolerance: float) -> str | None:
    """Where two records first differ by more than `tolerance` (relative, below 1 absolute); None where nowhere."""
    for key in [*want, *(key for key in got if key not in want)]:
        one, other = got.get(key, []), want.get(key, [])
        for step, (value, wanted) in enumerate(zip(one, other, strict=False)):
            if not abs(value - wanted) <= tolerance * max(1.0, abs(wanted)):
                return f"{key}, step {step}: {value!r}, not {wanted!r}"
        if len(one) != len(other):
            return f"{key}: {len(one)} steps, not {len(other)}"
    return None


def write(file: Path, losses: Losses, facts: dict[str, Any]) -> None:
    """Leave a record, of nine digits."""
    rounded = {key: [float(f"{value:.9g}") for value in values] for key, values in losses.items()}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in rounded.items())
    file.write_text(f'{{"facts": {json.dumps(facts)},\n "losses": {{\n{lines}\n}}}}\n')


def read(file: Path) -> Losses:
    """A record's losses."""
    losses: Losses = json.loads(file.read_text())["losses"]
    return losses
