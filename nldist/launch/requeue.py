"""Whether a Slurm job is started again: called by its batch script when its ranks have ended.

python -m nldist.launch.requeue CODE FOLDER MAX_CRASHES
"""

import os
import subprocess
import sys
from pathlib import Path

from nldist.dist.stop import EXIT_REQUEUE, EXIT_STOPPED

_FINAL = (0, 2, EXIT_STOPPED)  # done, something for the user to put right, stopped by the user


def main(code: int, folder: Path, max_crashes: int) -> int:
    """Requeue this job where its ranks ended with `code` before they were done; returns the job's exit code.

    A run that stopped before a time limit or a preemption is always started again. One that crashed is so
    `max_crashes` times: a lost rank is worth another try, an error in every try is not.
    """
    job = os.environ["SLURM_JOB_ID"]
    # Anything else (cancelled, out of time, requeued by Slurm itself) is decided already.
    if code in _FINAL or _state(job) != "RUNNING":
        return code
    if code != EXIT_REQUEUE:
        crashes = folder / f"{job}.crashes"
        num_crashes = len(crashes.read_text().splitlines()) if crashes.exists() else 0
        if num_crashes >= max_crashes:
            _say(f"ended with code {code} after {num_crashes} crashes: it is not started again")
            return code
        with crashes.open("a") as file:
            file.write(f"{code}\n")
    _say(f"ended with code {code}: it is started again")
    subprocess.run(["scontrol", "requeue", job], check=True)
    return code


def _state(job: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True).stdout
    return next(word.removeprefix("JobState=") for word in shown.split() if word.startswith("JobState="))


def _say(text: str) -> None:
    print(f"nldist: job {os.environ['SLURM_JOB_ID']} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
