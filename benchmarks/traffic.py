"""Bytes that each rank sends, from the code's own counters on 1 to 4 ranks, and by the same formulas on 64 and 1,024.

    python benchmarks/traffic.py

Counted is what ring algorithms send (see nldist.dist.world.World). The formulas, for W ranks, P parameters, B numbers
in batch norm's buffers, N samples, d features and k neighbours:

    a training pass     steps * 8 P (W-1)/W  +  8 B (W-1)/W
    a mining search     N (4 d + 16 (k+1)) (W-1)/W
    columns of b bytes per sample, replicated after a sweep: N b (W-1)/W

Leaves benchmarks/results/traffic-DATE.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import record
from commands import run_python, train

from nldist.errors import main_guard
from nldist.models import build_model

MIB = 2**20
# Networks and data sets of the full runs: images, batch per rank and network, features, neighbours.
FULL = {
    "webvision, inception_resnet_v2": {
        "N": 2_400_000,
        "batch": 128,
        "d": 1536,
        "k": 50,
        "model": "inception_resnet_v2",
        "classes": 1000,
    },
    "clothing1m, resnet50": {"N": 1_000_000, "batch": 64, "d": 2048, "k": 20, "model": "resnet50", "classes": 14},
}


@main_guard
def main() -> None:
    """Measure on 1 to 4 ranks, compare with the formulas, print and record both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/traffic"))
    options = parser.parse_args()
    data = options.work / "data"
    run_python("tools/shard.py", "digits", str(data), "--name", "digits")
    run_python("tools/noise.py", str(data), "--model=symmetric", "--rate=0.5", "--seed=0", "--name=sym50")
    measured = [measure(options.work, data, size) for size in (1, 2, 3, 4)]
    print(f"{'ranks':>5}  {'pass':10}  {'steps':>5}  {'sent MiB':>9}  {'formula':>9}")
    for rows in measured:
        for row in rows:
            print(f"{row['ranks']:5}  {row['pass']:10}  {row['steps']:5}  {row['sent']:9.3f}  {row['formula']:9.3f}")
    full = [predict(name, size) for name in FULL for size in (1, 8, 64, 1024)]
    print(f"\n{'MiB sent by each rank':34}  {'ranks':>5}  {'step':>7}  {'pass':>9}  {'tables':>7}  {'search':>8}")
    for row in full:
        numbers = f"{row['step']:7.1f}  {row['epoch']:9,.0f}  {row['tables']:7.1f}  {row['search']:8,.0f}"
        print(f"{row['run']:34}  {row['ranks']:5}  {numbers}")
    print(f"recorded in {record.write('traffic', ['torch'], {'measured': measured, 'formulas': full})}")


def measure(work: Path, data: Path, size: int) -> list[dict[str, Any]]:
    """What each pass of a short run has sent, beside its formula."""
    run_dir = work / f"ranks{size}"
    settings = [f"run.dir={run_dir}", f"data.root={data}", "method.name=scanmix", "train.epochs=2", "mine.block=500"]
    settings += ["method.dividemix.warmup_epochs=1", "track.enabled=false"]
    train("tests/digits.yaml", *settings, ranks=size)
    network = build_model("small_cnn", 10)
    # Two heads; batch norm's counters of batches are not averaged.
    num_parameters = sum(p.numel() for p in network.parameters()) + network.heads["classify"].weight.numel() + 10
    num_buffers = sum(b.numel() for b in network.buffers() if b.is_floating_point())
    warmup, divide = records(run_dir)
    (_, search) = records(next((run_dir / "stages").glob("mine-*")))
    steps = -(-1437 // (64 * size))
    cluster = training(size, steps, num_parameters, num_buffers) + columns(size, 1437, PREDICTED_BYTES)
    rows = [
        ("net0", steps, warmup["net0/sent_mib"], training(size, steps, num_parameters, num_buffers)),
        ("cluster0", steps, divide["cluster0/sent_mib"], cluster),
        ("sweep", 0, divide["sweep/sent_mib"], columns(size, 1437, SWEEP_BYTES)),
        ("search", 0, search["search/sent_mib"], neighbours(size, 1437, 16, 10)),
    ]
    return [{"ranks": size, "pass": name, "steps": n, "sent": sent, "formula": mib} for name, n, sent, mib in rows]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The lines on epochs of a run."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "epoch"]


def training(size: int, steps: int, num_parameters: int, num_buffers: int) -> float:
    """MiB of a training pass: gradients, and batch norm's statistics at its end."""
    return 8 * (steps * num_parameters + num_buffers) * (size - 1) / size / MIB


SWEEP_BYTES = 2 * 4  # replicated after a sweep: both networks' clean probabilities
PREDICTED_BYTES = 2  # before a clustering pass: the other network's classes


def columns(size: int, num_samples: int, num_bytes: int) -> float:
    """MiB of columns that are replicated."""
    return num_samples * num_bytes * (size - 1) / size / MIB


def neighbours(size: int, num_samples: int, dim: int, k: int) -> float:
    """MiB of a search for everybody's neighbours: queries to all ranks, and their lists back."""
    return num_samples * (4 * dim + 16 * (k + 1)) * (size - 1) / size / MIB


def predict(name: str, size: int) -> dict[str, Any]:
    """A full run by the formulas."""
    facts: dict[str, Any] = FULL[name]
    network = build_model(facts["model"], facts["classes"])
    num_parameters = sum(p.numel() for p in network.parameters())
    num_buffers = sum(b.numel() for b in network.buffers() if b.is_floating_point())
    steps = -(-facts["N"] // (facts["batch"] * size))
    return {
        "run": name,
        "ranks": size,
        "step": training(size, 1, num_parameters, 0),
        "epoch": training(size, steps, num_parameters, num_buffers),
        "tables": columns(size, facts["N"], SWEEP_BYTES + 2 * PREDICTED_BYTES),
        "search": neighbours(size, facts["N"], facts["d"], facts["k"]),
    }


if __name__ == "__main__":
    sys.exit(main())
