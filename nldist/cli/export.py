"""A run's networks for other programs: weights that timm loads, or an MLflow model.

nldist export runs/mine mine.safetensors --network 0
nldist export runs/mine mine.pt --network 0
nldist export runs/mine mine-model     (an MLflow model, a directory: all networks together)
nldist export runs/mine --mlflow       (the same, into the run that MLflow has of the training)
"""

import argparse
import os
import warnings
from pathlib import Path

from nldist.cli.options import Parser
from nldist.errors import UserError, main_guard
from nldist.track.tracker import HTTP_SETTINGS, PRIVACY_SETTINGS


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Export, and say where to."""
    parser = Parser(prog="nldist export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help=".safetensors, .pt or a directory; new")
    parser.add_argument("--network", type=int, metavar="N", help="which one, for a file of weights")
    parser.add_argument("--mlflow", action="store_true", help="put the model into the training's MLflow run")
    parser.add_argument("--weights", choices=("last", "best"), default="last")
    options = parser.parse_args(argv)
    if (options.out is None) != options.mlflow:
        raise UserError("give OUT, a new file or directory, or --mlflow")
    warnings.filterwarnings("ignore", module="mlflow")  # it warns of its own code, and wants examples for signatures
    os.environ.update({**HTTP_SETTINGS, **os.environ, **PRIVACY_SETTINGS})
    from nldist.train.export import PLAIN, export_model, export_plain, log_model

    if options.out is not None and options.out.suffix in PLAIN:
        export_plain(options.run, options.out, options.weights, options.network)
    elif options.network is not None:
        raise UserError(f"--network is for {', '.join(PLAIN)}: a model holds all networks")
    elif options.out is not None:
        export_model(options.run, options.out, options.weights)
    else:
        print(log_model(options.run, options.weights))
    if options.out is not None:
        print(f"written to {options.out}")
