#!/usr/bin/env bash
# torch 2.15.0 with CUDA's libraries, Linux, Python 3.11, no GPU: the end of a process takes more memory than all before.
#
# The guess: the peak memory that the system tells of a program that imports torch (os.wait4, /usr/bin/time -v, Slurm's
# MaxRSS) is what it needed while it ran. Seen: some 150 MB more, which are touched while the interpreter ends and the
# libraries are unloaded; after os._exit they are not. It is the same with much data and with none.
# Output, 2026-11-28, Linux 6.18:
#
#     peak memory in MB: 606 while it runs, 756 when it has ended, 605 when it ends by os._exit
#
# So a bound on a rank's memory has to be measured before it ends, and a job at its limit can be killed when all is done.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.9.7
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import os
import platform
import subprocess
import sys

PROGRAM = "import torch; print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0], flush=True)"


def megabytes(program: str) -> tuple[float, float]:
    """The most that a program has had until its last line, and what wait4 says when it has ended."""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    last = process.stdout.read()
    return int(last) / 1024, os.wait4(process.pid, 0)[2].ru_maxrss / 1024


running, ended = megabytes(PROGRAM)
_, at_once = megabytes(PROGRAM + "; import os; os._exit(0)")
print(f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}")
print(f"peak memory in MB: {running:.0f} while it runs, {ended:.0f} when it has ended, {at_once:.0f} when it ends by os._exit")
assert ended > running + 100 > at_once + 90
PY
