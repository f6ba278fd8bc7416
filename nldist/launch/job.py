"""What a job runs on each of its ranks."""

import os
import signal
from dataclasses import dataclass
from typing import Any

import submitit

from nldist.config import Config
from nldist.config.file import parse_config
from nldist.dist.stop import EXIT_REQUEUE, EXIT_STOPPED, REQUEST
from nldist.errors import REFUSAL_VARIABLE, main_guard
from nldist.launch.requeue import refusal


@dataclass(frozen=True)
class Here:
    """What ranks on this machine are told: the port where they meet, and their GPUs (as CUDA_VISIBLE_DEVICES)."""

    port: int
    gpus: str

    def tell(self) -> None:
        """Set what torchrun would set, from submitit's variables."""
        place = submitit.JobEnvironment()
        rank, size = str(place.local_rank), str(place.num_tasks)
        os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.port), CUDA_VISIBLE_DEVICES=self.gpus)
        if "SUBMITIT_FOLDER" in os.environ:  # not where submitit runs the job in its own process
            # Of an earlier job whose process had the same number.
            place.paths.result_pickle.unlink(missing_ok=True)


@dataclass
class TrainJob:
    """`nldist train` of one configuration, as submitit's callable.

    A job that was stopped before a time limit or a preemption is started again, and the run goes on by itself. So
    there is nothing that submitit's own checkpointing would have to do, in a signal's handler and on rank 0 alone.

    Attributes:
        config: of the run, resolved, as YAML: what it means is decided where it runs, by the nldist that is there then.
        stages: only these of the method's stages; None = all.
        here: for ranks on this machine; None = a cluster's.
    """

    config: str
    stages: list[str] | None = None
    here: Here | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Jobs that nldist 0.1 queued hold an object, without the settings that have come since."""
        config = state["config"]
        self.__dict__ |= state | {"config": config.to_yaml() if isinstance(config, Config) else config}

    def __call__(self) -> int:
        """Run it. Returns the exit code for the launcher that waits here; else ends the process with it."""
        REQUEST.listen()
        if self.here is not None:
            self.here.tell()
        elif "SLURM_JOB_ID" in os.environ:
            os.environ[REFUSAL_VARIABLE] = str(refusal(submitit.JobEnvironment().paths.folder))
        code = main_guard(self._train)()
        if code == 0 or (self.here is not None and code != EXIT_REQUEUE):
            return code
        if code == EXIT_STOPPED:
            # Slurm sends SIGTERM for a preemption and for scancel alike: the batch script sees which it was. And where
            # a rank dies and SIGTERM ends the others srun gives 143, too: that is no stop with all saved.
            code = EXIT_REQUEUE
        if code == EXIT_REQUEUE:
            # Slurm may send it still, such as for scontrol requeue. This rank is about to end, and with this code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(code)

    def _train(self) -> int:
        from nldist.train.stages import train

        return train(parse_config(self.config, "the job's configuration"), self.stages)
