"""What a job asks of a cluster: `cluster.yaml` and the launcher's options."""

import math
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from nldist.config import Name, Section
from nldist.config.file import explain
from nldist.errors import UserError

Cluster = Literal["slurm", "local", "debug"]
CLUSTER_FILE = Path("cluster.yaml")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


class ClusterSettings(Section):
    """Nodes, ranks, time and Slurm's own settings. `cluster.yaml` holds a user's; options go before it."""

    partition: Name | None = None
    account: Name | None = None
    constraint: Name | None = None
    qos: Name | None = None
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0, description="one rank each")
    tasks_per_node: int | None = Field(None, ge=1, description="ranks per node without GPUs; none = 1")
    cpus_per_task: int | None = Field(None, ge=1, description="cores of a rank and its data workers")
    mem_gb: float | None = Field(None, gt=0, description="memory of a node")
    time: Name = Field("24:00:00", description="limit of one start: [days-]hours:minutes:seconds; then it is requeued")
    grace_seconds: int = Field(120, ge=1, description="before the limit, to save; a run goes on from there")
    max_crashes: int = Field(3, ge=0, description="new starts after crashes in a row")
    setup: list[str] = Field([], description="shell lines before the ranks start, such as 'module load cuda'")
    srun: list[str] = Field([], description="further options of srun, such as [--container-image=/images/a.sqsh]")
    sbatch: dict[str, Any] = Field({}, description="further options of sbatch, such as {exclude: n13}")

    @field_validator("time", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        """YAML reads 24:00:00 as the number 86400, which Slurm would take for minutes."""
        if isinstance(value, int):
            raise ValueError("put it in quotes: without, YAML reads a time as a number")
        return value

    @property
    def ranks_per_node(self) -> int:
        """One rank per GPU, or per task where there are none."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node

    @property
    def minutes(self) -> int:
        """The time limit, rounded up, as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
        match = _TIME.fullmatch(self.time)
        if match is None:
            raise UserError(f"time {self.time!r} is not [days-]hours:minutes:seconds, such as 24:00:00")
        days, *parts = match.groups()
        numbers = [int(part) for part in parts if part is not None]
        if days is None and len(numbers) < 3:
            numbers = [0, *numbers]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return max(1, math.ceil((int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60))

    def check(self) -> None:
        """Refuse (UserError) what contradicts itself."""
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise UserError(
                f"{self.tasks_per_node} tasks per node do not fit {self.gpus_per_node} GPUs per node: a rank takes one "
                "GPU; leave tasks-per-node out"
            )
        if self.grace_seconds >= 60 * self.minutes:
            raise UserError(f"grace_seconds={self.grace_seconds} is as long as the time limit {self.time}; lower it")


def cluster_settings(cluster: Cluster, file: Path | None, options: dict[str, Any]) -> ClusterSettings:
    """For Slurm the settings of `file` (by default `cluster.yaml` here, if there is one) under the given options.

    On this machine only the options count: the file tells of a cluster.

    Raises:
        UserError: the file cannot be read, or a setting is unknown or wrong.
    """
    path = file or CLUSTER_FILE
    values: dict[str, Any] = {}
    if cluster == "slurm" and (file is not None or path.exists()):
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} must hold settings such as 'partition: gpu'")
    try:
        settings = ClusterSettings.model_validate(values | options)
    except ValidationError as error:
        raise UserError(f"{path if path.exists() else 'options'}: {explain(error, ClusterSettings)}") from None
    settings.check()
    return settings
