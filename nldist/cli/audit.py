"""A report about the labels of a run: which are probably wrong, to look at and to mark.

nldist audit RUN [--images 2000] [--out DIR] [key=value ...]

Leaves index.html (opened from the disk), labels.csv and labels.parquet (every label: key, path of its shard, given,
suggested, p_clean, margin, rank; the most doubtful first), duplicates.csv, in RUN/audit. What the page's button
"Download marks" saves is for nldist noise --marks.
"""

import argparse
from pathlib import Path

from nldist.cli.options import Parser, add_overrides
from nldist.errors import UserError, main_guard

_MAX_IMAGES = 5000  # what a browser shows without waiting


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Write the report."""
    parser = Parser(prog="nldist audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--images", type=int, default=2000, metavar="N", help="in the page, at most (default 2000)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/audit")
    add_overrides(parser, "such as data.root=...")
    options = parser.parse_with_overrides(argv)
    if not 1 <= options.images <= _MAX_IMAGES:
        raise UserError(f"--images is a number from 1 to {_MAX_IMAGES}, not {options.images}")
    from nldist.train.audit import audit

    for line in audit(options.run, options.out, options.images, options.overrides):
        print(line, flush=True)
