"""Whether a Slurm job is started again: called by its batch script when its ranks have ended.

python -m nldist.launch.requeue CODE FOLDER MAX_CRASHES
"""

import os
import subprocess
import sys
from pathlib import Path

from nldist.dist.environment import num_restarts
from nldist.dist.stop import EXIT_REQUEUE

_OUT_OF_TIME = "TimeLimit"
_FINAL = (0, 2)  # done; something for the user to put right


def main(code: int, folder: Path, max_crashes: int) -> int:
    """Requeue this job where its ranks ended with `code` before they were done; returns the job's exit code.

    A run that stopped for a time limit or a preemption is always started again. One that crashed is so
    `max_crashes` times: a lost rank is worth another try, an error in every try is not.
    """
    job = os.environ["SLURM_JOB_ID"]
    facts = _facts(job)
    if code in _FINAL or not _is_ours_to_decide(facts):
        return code
    if code != EXIT_REQUEUE and facts["Reason"] != _OUT_OF_TIME:
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


def _is_ours_to_decide(facts: dict[str, str]) -> bool:
    """Not where Slurm has requeued the job already, nor where somebody cancelled it."""
    if int(facts["Restarts"]) > num_restarts():
        return False
    return facts["JobState"] == "RUNNING" or facts["Reason"] == _OUT_OF_TIME


def _facts(job: str) -> dict[str, str]:
    """JobState, Reason, Restarts and more of what Slurm knows of a job."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def _say(text: str) -> None:
    print(f"nldist: job {os.environ['SLURM_JOB_ID']} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
