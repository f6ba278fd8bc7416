"""Check a data set on disk: files, checksums, index, every image and every label set.

Exit code 0: all is well. 1: something is off, listed one problem a line. 2: not a data set.
"""

import argparse
import os
import time
from pathlib import Path

from nldist.cli.options import Parser
from nldist.data.make.verify import verify
from nldist.errors import main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, check, and report."""
    parser = Parser(prog="nldist verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0: only this one (%(default)s)")
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    report = verify(arguments.dataset, arguments.workers)
    for problem in report.problems:
        print(problem)
    seconds = time.perf_counter() - start
    verdict = f"{len(report.problems):,} problems" if report.problems else "no problems"
    print(
        f"{arguments.dataset}: {report.num_samples:,} samples in {report.num_shards:,} shards: {verdict} "
        f"({seconds:.1f} s, {report.num_samples / seconds:,.0f} images/s)"
    )
    return 1 if report.problems else 0
