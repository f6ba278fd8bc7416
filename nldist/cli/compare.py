"""Compare methods: run them with several seeds each, or take runs that have ended.

nldist compare CONFIG --methods cross_entropy,dividemix --seeds 3 [key=value ...] [--tasks-per-node 2]
nldist compare RUN RUN ...

The first form runs what is missing of methods x seeds, one after the other on this machine or as an array on a cluster
(options as for nldist submit), below run.dir; the same command goes on where it was stopped. A RUN is a run directory,
or one that holds several. Prints a table; --out gets it as table.md and table.json, with the plot accuracy.png (the
first form leaves them in run.dir).
"""

import argparse
import json
from pathlib import Path

from nldist.cli.options import Parser
from nldist.cli.submit import add_cluster, cluster_of, settings_of
from nldist.errors import UserError, main_guard


def parser() -> Parser:
    """The command line."""
    parse = Parser(
        prog="nldist compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parse.add_argument("overrides", nargs="+", metavar="CONFIG key=value ... | RUN")
    parse.add_argument("--methods", metavar="A,B", help="values of method.name")
    parse.add_argument("--seeds", type=int, metavar="N", help="run.seed from 0 to N - 1 (default 1)")
    parse.add_argument("--out", type=Path, metavar="DIR", help="directory for table.md, table.json and accuracy.png")
    add_cluster(parse)
    return parse


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Run what is missing if there is a configuration; print, write and draw the comparison."""
    options = parser().parse_with_overrides(argv)
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; name a directory")
    if options.methods is None:
        for name, value in vars(options).items():
            if value is not None and name not in ("overrides", "out"):
                raise UserError(f"--{name.replace('_', '-')} is for runs that --methods starts; leave it out")
        if options.overrides[0].endswith((".yaml", ".yml")):
            raise UserError(f"{options.overrides[0]} is a configuration: say which --methods to run")
        report(list(dict.fromkeys(run for word in options.overrides for run in runs_in(Path(word)))), options.out)
        return 0
    return compare_methods(options)


def compare_methods(options: argparse.Namespace) -> int:
    """The first form: run, then compare what has ended."""
    cluster = cluster_of(options)
    settings = settings_of(options, cluster)
    # Imported when the options are known to be right: these take seconds.
    from nldist.launch.comparison import Comparison, check_methods
    from nldist.launch.submit import check_cluster

    check_cluster(cluster, settings)
    methods, (config, *overrides) = options.methods.split(","), options.overrides
    num_seeds = 1 if options.seeds is None else options.seeds
    check_methods(methods, num_seeds)
    comparison = Comparison(Path(config), overrides, methods, num_seeds, settings)
    out = options.out or comparison.root
    with comparison.tracked() as tracker:
        code = comparison.run(cluster, tracker)
        missing = [each.run.dir for each in comparison.missing]
        ended = [each.run.dir for each in comparison.configs if each.run.dir not in missing]
        if ended:
            for path in report(ended, out):
                tracker.artifact(path)
    if missing:
        print(f"{len(missing)} of {len(comparison.configs)} runs have not ended; the same command goes on with them")
    return code or (1 if missing else 0)


def runs_in(path: Path) -> list[Path]:
    """A run directory itself, or the run directories in it that have ended, by name."""
    if (path / "summary.json").exists() or not path.is_dir():
        return [path]
    return sorted(each.parent for each in path.glob("*/summary.json")) or [path]


def report(runs: list[Path], out: Path | None) -> list[Path]:
    """Print the table of runs that have ended; returns the files written below `out`."""
    from nldist.files import write_text
    from nldist.report.compare import as_markdown, as_text, draw, grouped, read, row

    groups = grouped(read(run) for run in runs)
    rows = [row(group) for group in groups]
    print(as_text(rows))
    if out is None:
        return []
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", as_markdown(rows))
    write_text(out / "table.json", json.dumps(rows, indent=2) + "\n")
    draw(out / "accuracy.png", groups)
    return [out / name for name in ("table.md", "table.json", "accuracy.png")]
