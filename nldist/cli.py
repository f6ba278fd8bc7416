"""The command line: nldist train | evaluate | dry-run | status | compare | sync."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from nldist.errors import UserError, main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run one command; exit code 0, 2 for a user's error, 143 or 144 when stopped with everything saved."""
    options = _parse(argv)
    command: int = options.command(options)
    return command


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Options may stand before, between and after the overrides."""
    options, rest = _parser().parse_known_args(argv)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        raise UserError(f"unknown argument {rest[0]}; see nldist --help")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nldist", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, or go on with an interrupted run; alone or under torchrun")
    _add_configuration(train)
    train.add_argument("--stages", help="only these stages of the method, such as pretext,mine (default: all)")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="accuracy of a run's weights on a split")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run directory")
    evaluate.add_argument("--split", help="default: the run's data.eval_split")
    evaluate.add_argument("--weights", choices=("last", "best"), default="last")
    _add_overrides(evaluate, "such as data.root=...")
    evaluate.set_defaults(command=_evaluate)

    dry_run = commands.add_parser("dry-run", help="check data and settings; print steps, memory and state; no training")
    _add_configuration(dry_run)
    dry_run.add_argument("--world-size", type=int, default=1, help="number of ranks to plan for")
    dry_run.set_defaults(command=_dry_run)

    status = commands.add_parser("status", help="how a run is doing")
    status.add_argument("run", type=Path, metavar="RUN")
    status.set_defaults(command=_status)

    compare = commands.add_parser("compare", help="a table of finished runs")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    compare.add_argument("--json", type=Path, help="also write the rows to this file")
    compare.set_defaults(command=_compare)

    sync = commands.add_parser("sync", help="send MLflow what it missed of a run")
    sync.add_argument("run", type=Path, metavar="RUN")
    sync.set_defaults(command=_sync)
    return parser


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/demo.yaml")
    _add_overrides(parser, "such as train.epochs=10")


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=example)


def _train(options: argparse.Namespace) -> int:
    from nldist.config.file import load_config

    config = load_config(options.config, options.overrides)
    from nldist.train.stages import train

    return train(config, options.stages.split(",") if options.stages else None)


def _evaluate(options: argparse.Namespace) -> int:
    from nldist.train.evaluate import evaluate

    result = evaluate(options.run, options.split, options.weights, options.overrides)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result, indent=2))
    return 0


def _dry_run(options: argparse.Namespace) -> int:
    from nldist.config.file import load_config
    from nldist.train.dry_run import dry_run

    for line in dry_run(load_config(options.config, options.overrides), options.world_size):
        print(line, flush=True)
    return 0


def _status(options: argparse.Namespace) -> int:
    from nldist.run.status import describe, read_status

    for line in describe(read_status(options.run), time.time()):
        print(line)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from nldist.files import write_text
    from nldist.report.compare import compare, table

    rows = compare(options.runs)
    print(table(options.runs, rows))
    if options.json:
        write_text(options.json, json.dumps(rows, indent=2) + "\n")
    return 0


def _sync(options: argparse.Namespace) -> int:
    from nldist.track.tracker import sync

    sync(options.run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
