"""Write a data set's shards on the nodes of a Slurm cluster: as `nldist shard`, the same bytes.

nldist submit --shard webvision raw/webvision data/webvision --resize 256 --nodes 8 --cpus-per-task 16 --time 4:00:00

What follows --shard, in any order with the options below, are the words of nldist shard (see nldist shard LAYOUT -h).
An array of jobs, one for each of --nodes, writes the shards; a last one finishes the data set when all have ended
well. Each has --cpus-per-task processes, or --workers. The same command goes on with what is missing, also with
another number of nodes. Logs are in OUT-logs.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nldist.cli.options import Parser
from nldist.cli.shard import parser as shard_parser
from nldist.cli.shard import sources_of, write_options
from nldist.cli.submit import add_cluster, cluster_of, numbers, report, settings_of
from nldist.data.make.build import Build
from nldist.data.make.writer import SplitWriter
from nldist.errors import UserError
from nldist.launch.settings import ClusterSettings

if TYPE_CHECKING:
    from nldist.launch.sharding import Sharding


def submit_shards(words: Sequence[str]) -> int:
    """Check, submit, and follow if asked to."""
    options, rest = _parser().parse_known_args(words)
    arguments = shard_parser().parse_args(rest)
    settings = _settings(options)
    if arguments.workers is None:
        arguments.workers = settings.cpus_per_task or 1
    writers = _writers(arguments)
    # Imported when the options are known to be right: these take seconds.
    from nldist.launch.follow import wait
    from nldist.launch.sharding import Sharding
    from nldist.launch.submit import check_cluster

    check_cluster("slurm", settings)
    out = arguments.out.absolute()
    sharding = Sharding(writers, out.with_name(f"{out.name}-logs"), settings)
    if options.dry_run:
        for writer in writers:
            found = writer.find()
            writer.build.check(found.plan, found.listing.classes)
            print(f"# {writer.build.folder}: {found.table.num_rows:,} images")
        print("\n".join(sharding.batch_files()))
        return 0
    with sharding.alone():
        for summary in sharding.begin():
            print(summary.report(arguments.out / summary.split, 0), flush=True)
        jobs = _queued(sharding) if sharding.writers else []
    return wait(jobs) if jobs and options.wait else 0


def _parser() -> Parser:
    parse = Parser(
        prog="nldist submit --shard",
        description=__doc__,
        usage="nldist submit --shard LAYOUT ... OUT [options of nldist shard] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parse.add_argument("--shard", action="store_true", help=argparse.SUPPRESS)
    add_cluster(parse)
    parse.add_argument("--wait", action="store_true", help="show the jobs' output until the end")
    parse.add_argument("--dry-run", action="store_true", help="check, and print the sbatch files; queue nothing")
    return parse


def _settings(options: argparse.Namespace) -> ClusterSettings:
    """The cluster's settings, without the GPUs that cluster.yaml may have for training."""
    if cluster_of(options) != "slurm":
        raise UserError("--shard makes jobs of a Slurm cluster; on this machine: nldist shard ... --workers N")
    for name in ("gpus_per_node", "tasks_per_node"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for training; sharding takes --cpus-per-task")
    return settings_of(options, "slurm").model_copy(update={"gpus_per_node": 0, "tasks_per_node": None})


def _writers(arguments: argparse.Namespace) -> list[SplitWriter]:
    if arguments.layout == "webdataset":
        raise UserError("tars that somebody else wrote are indexed on one machine: nldist shard webdataset ...")
    written = write_options(arguments)
    sources = sources_of(arguments).items()
    return [SplitWriter(source, Build(arguments.out, split), written) for split, source in sources]


def _queued(sharding: "Sharding") -> list:
    jobs, finish = sharding.submit()
    print("\n".join([*report(None, jobs), *report("finish", [finish])]), flush=True)
    print(f"to cancel  scancel {numbers([*jobs, finish])}", flush=True)
    return [*jobs, finish]
