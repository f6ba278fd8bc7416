"""The command line: `nldist COMMAND ...`, one module for each command."""

import importlib
import sys

from nldist.cli.options import Parser
from nldist.errors import main_guard

COMMANDS = {
    "shard": "raw images into a data set of shards, or an index of tars that somebody else wrote",
    "noise": "another label set: a noise model's, or a table's",
    "verify": "check a data set: files, index, every image",
    "dry-run": "check data and settings; print steps, memory and state; no training",
    "train": "train, or go on with an interrupted run; alone or under torchrun",
    "submit": "the same on a Slurm cluster, or on several ranks of this machine",
    "status": "how a run is doing",
    "evaluate": "accuracy of a run's weights on a split",
    "predict": "labels and probabilities for images",
    "export": "a run's networks for other programs: weights for timm, an MLflow model",
    "compare": "a table of finished runs",
    "audit": "a page and tables about the labels of a run: which are probably wrong",
    "sync": "send MLflow what it missed of a run",
}


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run one command; exit code 0, 2 for a user's error, 143 or 144 when stopped with everything saved."""
    words = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="nldist", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        commands.add_parser(name, help=about, add_help=False)
    command = parser.parse_args(words[:1]).command
    module = importlib.import_module(f"nldist.cli.{command.replace('-', '_')}")
    code: int = module.main(words[1:])
    return code
