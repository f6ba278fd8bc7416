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

_NUM_TRIES, _TRY_SECONDS = 30, 10
_ROW_SECONDS = 3600
_OUT_OF_TIME = "TimeLimit"
_FINAL = (0, 2)  # done; something for the user to put right


def main(code: int, folder: Path, max_crashes: int) -> int:
    """Requeue this job where its ranks ended with `code` before they were done; returns the job's exit code.

    A run that stopped for a time limit or a preemption is always started again. One that crashed is so
    `max_crashes` times in a row: a lost rank is worth another try, an error in every try is not, nor is a time
    limit that comes before the ranks have begun to listen for signals.
    """
    if code in _FINAL:
        return code
    facts = _facts()
    if not _is_ours_to_decide(facts):
        return code
    crashes = folder / f"{os.environ['SLURM_JOB_ID']}.crashes"
    if code == EXIT_REQUEUE:
        crashes.unlink(missing_ok=True)
    elif facts["Reason"] != _OUT_OF_TIME and _count_crash(crashes, code) > max_crashes:
        _say(f"ended with code {code}, its {max_crashes + 1}. crash in a row: it is not started again")
        return code
    _say(f"ended with code {code}: it is started again")
    _scontrol("requeue", _name())
    return code


def _count_crash(file: Path, code: int) -> int:
    """Note a crash; returns how many there were in a row, without a stop or an hour in between."""
    if file.exists() and time.time() - file.stat().st_mtime > _ROW_SECONDS:
        file.unlink()
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
