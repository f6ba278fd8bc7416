"""Which rank this process is: what torchrun, a Slurm step or nothing says."""

import os
from dataclasses import dataclass

from nldist.errors import UserError

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below the range that Linux gives to outgoing connections


@dataclass(frozen=True)
class Place:
    """A process among the ranks of a run, and where they meet.

    Attributes:
        num_local: ranks on this node.
        num_threads: OMP_NUM_THREADS, or in a Slurm step the CPUs that are this rank's own; None where the node's are
            shared by its ranks.
        address, port: of rank 0's store; None with one rank, or where the environment has them already.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    num_local: int = 1
    num_threads: int | None = None
    address: str | None = None
    port: int | None = None

    @classmethod
    def find(cls) -> "Place":
        """The place that the environment gives this process.

        torchrun's variables count first: it may run inside a Slurm job. Slurm's count in a step only (srun): a batch
        script has them, too, and is no rank.

        Raises:
            UserError: a variable is missing or no number.
        """
        try:
            if "RANK" in os.environ:
                threads = _omp_threads()
                return cls(
                    rank=_number("RANK"),
                    size=_number("WORLD_SIZE"),
                    local_rank=_number("LOCAL_RANK"),
                    num_local=_number("LOCAL_WORLD_SIZE"),
                    # torchrun sets 1 where the user has set nothing.
                    num_threads=None if threads == 1 and "TORCHELASTIC_RUN_ID" in os.environ else threads,
                )
            if "SLURM_STEP_ID" in os.environ and _number("SLURM_STEP_NUM_TASKS") > 1:
                return cls._of_slurm()
            # The launcher's batch script sets it for each rank of a step, whatever the node has.
            return cls(num_threads=None if "SLURM_STEP_ID" in os.environ else _omp_threads())
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the launcher's environment is broken ({error}); start through submit.py, torchrun or srun"
            ) from error

    @classmethod
    def _of_slurm(cls) -> "Place":
        from submitit.slurm.slurm import _parse_node_list

        num_local = _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])[_number("SLURM_NODEID")]
        return cls(
            rank=_number("SLURM_PROCID"),
            size=_number("SLURM_STEP_NUM_TASKS"),
            local_rank=_number("SLURM_LOCALID"),
            num_local=num_local,
            # Not those that it may use: Slurm need not bind a job to its own.
            num_threads=max(1, _number("SLURM_CPUS_ON_NODE") // num_local),
            address=_parse_node_list(os.environ["SLURM_STEP_NODELIST"])[0],
            # Neighbouring jobs and steps have different ports, so that two on one node do not meet; so have the starts
            # of a job, as the port of one may be taken.
            port=_FIRST_PORT + (_step_number() + 997 * num_restarts()) % _NUM_PORTS,
        )


def _omp_threads() -> int | None:
    """OMP_NUM_THREADS; None where it is not set, or is a list for nested teams."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) or None if text.isdecimal() else None


def _step_number() -> int:
    return _number("SLURM_JOB_ID") * 8 + _number("SLURM_STEP_ID")


def _number(name: str) -> int:
    return int(os.environ[name])


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" as [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.removesuffix(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def num_restarts() -> int:
    """How often the cluster has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def job_id() -> str | None:
    """The cluster's name of this job; None without one."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID")
