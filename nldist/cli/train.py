"""Train, or go on with an interrupted run; alone, under torchrun, or as a Slurm step."""

from nldist.cli.options import Parser, add_configuration
from nldist.config.file import load_config
from nldist.errors import main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Check the configuration and run its stages."""
    parser = Parser(prog="nldist train", description=__doc__)
    add_configuration(parser)
    parser.add_argument("--stages", help="only these stages of the method, such as pretext,mine (default: all)")
    options = parser.parse_with_overrides(argv)
    config = load_config(options.config, options.overrides)
    from nldist.train.stages import train

    return train(config, options.stages.split(",") if options.stages else None)
