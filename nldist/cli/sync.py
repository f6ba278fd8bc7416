"""Send MLflow what it missed of a run."""

from pathlib import Path

from nldist.cli.options import Parser
from nldist.errors import main_guard


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Send it."""
    parser = Parser(prog="nldist sync", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    run = parser.parse_args(argv).run
    from nldist.track.tracker import sync

    sync(run)
