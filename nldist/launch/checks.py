"""What is refused before anything is queued: data, settings, run directories."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from nldist.config import Config
from nldist.errors import UserError
from nldist.launch.settings import ClusterSettings
from nldist.passes.data import Data
from nldist.run.directory import RunDirectory
from nldist.train.dry_run import dry_run
from nldist.train.stages import stage_directories


def check(configs: Sequence[Config], settings: ClusterSettings) -> None:
    """Refuse (UserError) what the runs would refuse when they start: data, labels, network, batch sizes."""
    with tempfile.TemporaryDirectory() as cache:
        # The nodes' cache is not this machine's.
        here = [_with_cache(config, Path(cache)) for config in configs]
        for config in _different(here):
            for _ in dry_run(config, settings.num_ranks):
                pass
        stages = [_stages(config) for config in here]
    taken: set[Path] = set()
    for own in stages:
        for path in own:
            if path in taken and RunDirectory(path).summary is None:
                raise UserError(
                    f"runs of the array share the stage {path}, which only one of them can run; run it first, in a job "
                    "of its own, or give each run its own stages (run.stages_dir=null)"
                )
        taken.update(own)


def _different(configs: Sequence[Config]) -> list[Config]:
    """One of those that differ in nothing but their seeds and run directories, which no check depends on."""
    seen: dict[str, Config] = {}
    for config in configs:
        run = config.run.model_copy(update={"seed": 0, "dir": Path()})
        seen.setdefault(config.model_copy(update={"run": run}).model_dump_json(), config)
    return list(seen.values())


def _stages(config: Config) -> list[Path]:
    """The directories of a run's stages, in their order."""
    images = Data.open(config.data).fingerprint(labels=False)
    return list(stage_directories(config, images).values())


def _with_cache(config: Config, cache: Path) -> Config:
    if config.data.cache_dir is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": cache})})


def claim(configs: Sequence[Config]) -> None:
    """Refuse (UserError) run directories that cannot be written, are in use, or hold runs with other settings."""
    for config in configs:
        run = RunDirectory(config.run.dir)
        run.claim(config)
        run.close()
