#!/usr/bin/env bash
# Linux, Python 3.11: the peak memory that wait4 and getrusage tell of a command is at least its parent's.
#
# The guess: ru_maxrss of os.wait4, of resource.getrusage(RUSAGE_CHILDREN) and of tools on top of them is the peak of the
# command that was run. Seen: whatever it is, at least what the program that starts it holds. A process keeps over exec the
# high-water mark of what it was before, and before exec it was the parent's memory (shared, as subprocess uses vfork).
# Output, 2026-11-28, NumPy 2.2.6 for the memory that is held:
#
#     peak memory of `true` in MB: 25 before, 626 while 600 MB are held, 11 with a small process in between
#
# So a benchmark that makes its data in memory and then measures a command measures itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy==2.2.6
"$folder/venv/bin/python" - <<'PY'
import os
import platform
import subprocess
import sys

import numpy as np


def peak_mb(command: list[str]) -> float:
    """What wait4 says of a command."""
    process = subprocess.Popen(command)
    return os.wait4(process.pid, 0)[2].ru_maxrss / 1024


SMALL = "import resource, subprocess, sys; subprocess.run(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
before = peak_mb(["true"])
held = np.ones(600 * 2**20 // 8)
during = peak_mb(["true"])
small = subprocess.run([sys.executable, "-c", SMALL, "true"], stdout=subprocess.PIPE, text=True, check=True)
del held
print(f"Linux {platform.release().split('-')[0]}, Python {platform.python_version()}")
told = f"{before:.0f} before, {during:.0f} while 600 MB are held, {float(small.stdout):.0f} with a small process in between"
print(f"peak memory of `true` in MB: {told}")
assert during > 600 > 100 > float(small.stdout)
PY
