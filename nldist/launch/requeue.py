"""Whether a Slurm job is started again: called by its batch script when its ranks have ended.

python -m nldist.launch.requeue CODE FOLDER MAX_CRASHES
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from nldist.dist.environment import job_id, num_restarts
from nldist.dist.stop import EXIT_REQUEUE
from nldist.errors import EXIT_REFUSED

_NUM_TRIES, _TRY_SECONDS = 30, 10
_LONG_SECONDS = 3600
_OUT_OF_TIME = "TimeLimit"


def main(code: int, folder: Path, max_crashes: int) -> int:
    """Requeue this job where its ranks ended with `code` before they were done; returns the job's exit code.

    A run that stopped for a time limit or a preemption is always started again. One that crashed is so
    `max_crashes` times in a row: a lost rank is worth another try, an error in every try is not, nor is a time
    limit that comes before the ranks have begun to listen for signals.
    """
    if refusal(folder).exists():
        refusal(folder).unlink()  # it is this start's: a later one, when all is put right, must not find it
        code = EXIT_REFUSED
    if code in (0, EXIT_REFUSED):
        return code
    facts = _facts()
    if not _is_ours_to_decide(facts):
        return code
    crashes = folder / f"{os.environ['SLURM_JOB_ID']}.crashes"
    if code == EXIT_REQUEUE or _seconds(facts["RunTime"]) > _LONG_SECONDS:
        crashes.unlink(missing_ok=True)
    if code != EXIT_REQUEUE and _count_crash(crashes, code) > max_crashes:
        _say(f"ended with code {code}, its {max_crashes + 1}. crash in a row: it is not started again")
        return code
    _say(f"ended with code {code}: it is started again")
    # Somebody may cancel the job in this moment: Slurm would start a running one again, and one that has ended.
    only = ["incomplete"] if facts["JobState"] == "RUNNING" else []
    _scontrol("requeue", *only, _name())
    return code


def refusal(folder: Path) -> Path:
    """A rank that has found something for the user to put right leaves this file.

    Its exit code would not do: the others may be killed, and for srun a signal counts before any code.
    """
    return folder / f"{os.environ['SLURM_JOB_ID']}.refused"


def _seconds(run_time: str) -> int:
    """Slurm's "1-02:03:04", how long this start has lasted."""
    days, _, clock = run_time.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _count_crash(file: Path, code: int) -> int:
    """Note a crash; returns how many there were in a row."""
    with file.open("a+") as lines:
        lines.write(f"{code}\n")
        lines.seek(0)
        return len(lines.readlines())


def _is_ours_to_decide(facts: dict[str, str]) -> bool:
    """Not where Slurm has requeued the job already, nor where somebody cancelled it."""
    if int(facts["Restarts"]) > num_restarts():
        return False
    return facts["JobState"] == "RUNNING" or facts["Reason"] == _OUT_OF_TIME


def _facts() -> dict[str, str]:
    """JobState, Reason, Restarts and more of what Slurm knows of this job."""
    shown = _scontrol("--oneliner", "show", "job", _name())
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def _name() -> str:
    """This job's name; of an array's member not its number alone, which one of them shares with the whole array."""
    name = job_id()
    assert name is not None
    return name


def _scontrol(*arguments: str) -> str:
    """What a command of Slurm's prints; a controller that is away for some minutes is waited for."""
    for _ in range(_NUM_TRIES):
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout
        time.sleep(_TRY_SECONDS)
    raise RuntimeError(f"scontrol {' '.join(arguments)}: {done.stderr.strip()}")


def _say(text: str) -> None:
    print(f"nldist: job {os.environ['SLURM_JOB_ID']} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
