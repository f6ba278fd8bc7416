"""How a run is doing, from its directory alone."""

import time
from pathlib import Path

from nldist.cli.options import Parser
from nldist.errors import main_guard
from nldist.run.status import describe, is_claimed, read_status


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Print the status."""
    parser = Parser(prog="nldist status", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    run = parser.parse_args(argv).run
    for line in describe(read_status(run), time.time(), is_claimed(run)):
        print(line)
