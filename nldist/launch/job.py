"""What a job runs on each of its ranks."""

import os
from dataclasses import dataclass

import submitit

from nldist.config import Config
from nldist.dist.stop import EXIT_REQUEUE, EXIT_STOPPED, REQUEST
from nldist.errors import main_guard


@dataclass
class TrainJob:
    """`nldist train` of one configuration, as submitit's callable.

    A job that was stopped before a time limit or a preemption is started again, and the run goes on by itself. So
    there is nothing that submitit's own checkpointing would have to do, in a signal's handler and on rank 0 alone.

    Attributes:
        config: of the run.
        stages: only these of the method's stages; None = all.
        port: where the ranks of a job on this machine meet.
    """

    config: Config
    stages: list[str] | None = None
    port: int | None = None

    def __call__(self) -> int:
        """Run it; returns the exit code 0. Ends the process where that is another one, or a traceback would follow."""
        REQUEST.listen()
        if self.port is not None:
            self._meet_here(self.port)
        from nldist.stages import train

        code = main_guard(train)(self.config, self.stages)
        if code == 0:
            return code
        if code == EXIT_STOPPED and self.port is None:
            # Slurm sends SIGTERM for a preemption and for scancel alike: the batch script sees which it was. And where
            # a rank dies and SIGTERM ends the others srun gives 143, too: that is no stop with all saved.
            code = EXIT_REQUEUE
        raise SystemExit(code)

    def _meet_here(self, port: int) -> None:
        """What torchrun would say, from submitit's variables."""
        place = submitit.JobEnvironment()
        rank, size = place.local_rank, place.num_tasks
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size),
        }
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
