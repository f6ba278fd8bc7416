"""Accuracy of a run's weights on a split."""

import json
from pathlib import Path

from nldist.cli.options import Parser, add_overrides
from nldist.errors import main_guard


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Evaluate; rank 0 prints the result."""
    parser = Parser(prog="nldist evaluate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--split", help="default: the run's data.eval_split")
    parser.add_argument("--weights", choices=("last", "best"), default="last")
    add_overrides(parser, "such as data.root=...")
    options = parser.parse_with_overrides(argv)
    from nldist.dist.environment import Place
    from nldist.train.evaluate import evaluate

    result = evaluate(options.run, options.split, options.weights, options.overrides)
    if Place.find().rank == 0:
        print(json.dumps(result, indent=2))
