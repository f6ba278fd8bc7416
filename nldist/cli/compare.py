"""A table of finished runs."""

import json
from pathlib import Path

from nldist.cli.options import Parser
from nldist.errors import main_guard
from nldist.files import write_text
from nldist.report.compare import compare, table


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Print the table, and write its rows where asked to."""
    parser = Parser(prog="nldist compare", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    rows = compare(options.runs)
    print(table(options.runs, rows))
    if options.json:
        write_text(options.json, json.dumps(rows, indent=2) + "\n")
