"""Check data and settings; print steps, memory and state per sample. Nothing is trained or written."""

from nldist.cli.options import Parser, add_configuration
from nldist.config.file import load_config
from nldist.errors import main_guard


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Print the report."""
    parser = Parser(prog="nldist dry-run", description=__doc__)
    add_configuration(parser)
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks to plan for")
    options = parser.parse_with_overrides(argv)
    config = load_config(options.config, options.overrides)
    from nldist.train.dry_run import dry_run

    for line in dry_run(config, options.world_size):
        print(line, flush=True)
