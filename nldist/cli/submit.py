"""Submit a run to a cluster, or start it on this machine with several ranks.

nldist submit CONFIG [key=value ...] --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu
nldist submit configs/demo.yaml --cluster local --tasks-per-node 2 --wait
nldist submit --shard webvision raw/webvision data/webvision --nodes 8 --cpus-per-task 16 (see nldist submit --shard -h)

Configuration, data and paths are checked before anything is queued. Options that are the same for all your jobs go
into cluster.yaml (see docs/clusters.md).
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from nldist.cli.options import Parser
from nldist.config import Config
from nldist.errors import UserError, main_guard
from nldist.launch.settings import Cluster, ClusterSettings, cluster_settings
from nldist.launch.slurm import has_slurm

SLURM_ONLY = ("partition", "account", "constraint", "qos", "time", "mem_gb", "cpus_per_task", "cluster_file", "dry_run")


def parser() -> Parser:
    """The command line."""
    parse = Parser(
        prog="nldist submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parse.add_argument("config", type=Path, metavar="CONFIG")
    parse.add_argument("overrides", nargs="*", metavar="key=value")
    add_cluster(parse)
    parse.add_argument("--array-seeds", metavar="0-4", help="an array with these seeds")
    parse.add_argument("--sweep", action="append", default=[], metavar="KEY=V,V", help="an array with these values")
    parse.add_argument("--stages", action="store_true", help="a job for each stage, each after the one before")
    parse.add_argument("--wait", action="store_true", help="show rank 0's output until the end")
    parse.add_argument("--dry-run", action="store_true", help="print the sbatch file; queue nothing")
    return parse


def add_cluster(parse: Parser) -> None:
    """Where runs go, and what they get there."""
    parse.add_argument("--cluster", choices=("slurm", "local", "debug"), help="default: slurm where it is installed")
    parse.add_argument("--cluster-file", type=Path, help="default: cluster.yaml, if there is one")
    parse.add_argument("--nodes", type=int)
    parse.add_argument("--gpus-per-node", type=int, help="one rank each")
    parse.add_argument("--tasks-per-node", type=int, help="ranks per node without GPUs (default 1)")
    parse.add_argument("--cpus-per-task", type=int, help="cores of a rank and its data workers")
    parse.add_argument("--mem-gb", type=float, help="memory of a node")
    parse.add_argument("--time", help="limit of one start, [days-]hours:minutes:seconds; then the job is requeued")
    for name in ("partition", "account", "constraint", "qos"):
        parse.add_argument(f"--{name}")


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The cluster that is chosen, and UserError for an option that it does not know."""
    cluster: Cluster = options.cluster or ("slurm" if has_slurm() else "local")
    for name in SLURM_ONLY if cluster != "slurm" else ():
        if getattr(options, name, None):
            raise UserError(f"--{name.replace('_', '-')} is for Slurm; leave it out with --cluster {cluster}")
    return cluster


def settings_of(options: argparse.Namespace, cluster: Cluster) -> ClusterSettings:
    """The options of `add_cluster` and those of cluster.yaml."""
    given = {name: getattr(options, name, None) for name in ClusterSettings.model_fields}
    return cluster_settings(
        cluster, options.cluster_file, {name: value for name, value in given.items() if value is not None}
    )


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Check, submit, and follow if asked to."""
    words = sys.argv[1:] if argv is None else argv
    if "--shard" in words:
        from nldist.cli.submit_shard import submit_shards

        return submit_shards(words)
    options = parser().parse_with_overrides(words)
    cluster = cluster_of(options)
    refuse(options, cluster)
    settings = settings_of(options, cluster)
    # Imported when the options are known to be right: these take seconds.
    from nldist.launch.checks import check, claim
    from nldist.launch.submit import check_cluster, members, seeds

    check_cluster(cluster, settings)
    sweeps = [*options.sweep, *([seeds(options.array_seeds)] if options.array_seeds else [])]
    configs = members(options.config, options.overrides, sweeps)
    check(configs, settings)
    if options.dry_run:
        print_files(configs, settings, options.stages)
        return 0
    claim(configs)
    return queue(configs, cluster, settings, options)


def refuse(options: argparse.Namespace, cluster: str) -> None:
    """Options that contradict the cluster."""
    if cluster == "slurm":
        return
    if options.stages:
        raise UserError(
            f"--stages makes jobs that wait for each other; with --cluster {cluster} one job runs all stages"
        )
    if options.sweep or options.array_seeds:
        raise UserError(
            f"an array of runs is for Slurm; with --cluster {cluster} start them one by one, or by nldist compare"
        )


def root_of(configs: list[Config]) -> Path:
    """The run directory, or the one that holds those of an array."""
    return configs[0].run.dir if len(configs) == 1 else configs[0].run.dir.parent


def print_files(configs: list[Config], settings: ClusterSettings, stages: bool) -> None:
    """The batch file of each job."""
    from nldist.launch.submit import after, sbatch_text

    root, dependency = root_of(configs), None
    for stage in chain(configs[0]) if stages else [None]:
        name = f"{root.name}-{stage}" if stage else root.name
        print(sbatch_text(len(configs), (root / "logs").absolute(), name, settings, dependency))
        dependency = after(f"JOB-{stage}", len(configs))  # whose number is not known yet


def queue(configs: list[Config], cluster: Cluster, settings: ClusterSettings, options: argparse.Namespace) -> int:
    """Queue the jobs, say what was queued, and follow them if asked to."""
    from nldist.launch.follow import wait
    from nldist.launch.submit import share_cores, submit

    root, jobs = root_of(configs), []
    if cluster != "slurm":
        share_cores(settings)
    stages = chain(configs[0]) if options.stages else None
    try:
        for submission in submit(configs, cluster, (root / "logs").absolute(), settings, stages):
            jobs += submission.jobs
            print("\n".join(report(submission.stage, submission.jobs)), flush=True)
    except UserError as error:
        if not jobs:
            raise
        raise UserError(f"{error}; the stages before are queued: scancel {numbers(jobs)}") from None
    print("\n".join(advice(configs, root, cluster, jobs)), flush=True)
    if cluster == "debug":
        return max(job.result() for job in jobs)
    return wait(jobs) if options.wait else 0


def chain(config: Config) -> list[str]:
    """The stages of the configured method, the training last."""
    from nldist.train.stages import stages_of

    return [stage.name for stage in stages_of(config)]


def report(stage: str | None, jobs: list) -> Iterator[str]:
    """A line per job."""
    for job in jobs:
        what = f" ({stage})" if stage else ""
        yield f"job {job.job_id}{what}: {job.paths.stdout}"


def numbers(jobs: list) -> str:
    """The jobs as scancel knows them; an array by the number that its members share."""
    return " ".join(dict.fromkeys(job.job_id.partition("_")[0] for job in jobs))


def advice(configs: list[Config], root: Path, cluster: str, jobs: list) -> Iterator[str]:
    """Where to look, and what to type next."""
    from nldist.track.store import store_uri

    run = configs[0].run.dir
    yield f"runs in    {root}" + (f" ({len(configs)} of them)" if len(configs) > 1 else "")
    if configs[0].track.enabled:
        uri = store_uri(configs[0])
        yield f"MLflow     {uri if uri.startswith('http') else f'mlflow ui --backend-store-uri {shlex.quote(uri)}'}"
    yield f"to follow  nldist status {shlex.quote(str(run))}"
    if cluster == "slurm":
        yield f"to cancel  scancel {numbers(jobs)}"
    elif cluster == "local":
        yield f"to stop    kill {jobs[0].job_id} (saved; the same command goes on)"
