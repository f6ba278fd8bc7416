"""PreAct-ResNet-18 as it was until nldist 0.1 and as DivideMix's authors have it, on real CIFAR-10 images, on a CPU.

    python benchmarks/preact.py

Until 0.1 the identity shortcuts of `preact_resnet18` carried a block's input (He et al. 2016b), not its first
activation (DivideMix). 5,000 training images, half of the labels drawn at random, cross-entropy for six epochs as in
DivideMix's warm-up, 2,000 test images. The former network is a reference of our own. Needs `cifar10_images.tar.gz` in
the directory given by --source. Leaves benchmarks/results/preact-DATE.json.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
import torch.nn.functional as F
from cifar import prepare

from nldist.config.file import load_config
from nldist.errors import main_guard
from nldist.models.build import OWN_BACKBONES
from nldist.models.resnet_cifar import PreActBlock, ResNetCIFAR
from nldist.train.stages import train

SETTINGS = [
    *("method.name=cross_entropy", "train.epochs=6", "train.batch_size=128", "data.label_set=sym50"),
    *("optim.lr=0.02", "optim.schedule=step"),
]


class Former(PreActBlock):
    """The block until nldist 0.1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like PreActBlock's, but for identity shortcuts."""
        activated = F.relu(self.bn1(x))
        shortcut = x if isinstance(self.shortcut, torch.nn.Identity) else self.shortcut(activated)
        return torch.add(self.conv2(F.relu(self.bn2(self.conv1(activated)))), shortcut)


NETWORKS = {"former": "preact_resnet18_former", "present": "preact_resnet18"}
OWN_BACKBONES[NETWORKS["former"]] = partial(ResNetCIFAR, Former, (2, 2, 2, 2))


@main_guard
def main() -> None:
    """Train what has not been trained yet, print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data/cifar10"))
    parser.add_argument("--work", type=Path, default=Path("runs/preact"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.labels = "sym50"
    prepare(options, num_train=5000, num_test=2000)
    rows = [run(network, seed, options.work) for seed in options.seeds for network in NETWORKS]
    report(rows)
    print(f"recorded in {record.write('preact', ['torch', 'torchvision'], {'runs': rows})}")


def run(network: str, seed: int, work: Path) -> dict[str, Any]:
    """One run in this process; its summary, and the accuracy after each epoch."""
    directory = work / f"{network}-{seed}"
    places = [
        f"model.name={NETWORKS[network]}",
        f"data.root={work / 'data'}",
        f"run.dir={directory}",
        f"run.seed={seed}",
    ]
    train(load_config(Path(__file__).with_name("cifar5k.yaml"), [*SETTINGS, *places]))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["accuracy"] for line in lines if line["kind"] == "epoch"]
    return {"network": network, "accuracies": accuracies, **json.loads((directory / "summary.json").read_text())}


def report(rows: list[dict[str, Any]]) -> None:
    """Print the accuracy after each epoch, of each seed and the median."""
    for network in NETWORKS:
        runs = [row for row in rows if row["network"] == network]
        for row in runs:
            accuracies = "  ".join(f"{accuracy:5.2f}" for accuracy in row["accuracies"])
            print(f"{network:8}  seed {row['seed']}  {accuracies}")
        median = statistics.median(row["accuracies"][-1] for row in runs)
        print(f"{network:8}  median after the last epoch {median:.2f}")


if __name__ == "__main__":
    sys.exit(main())
