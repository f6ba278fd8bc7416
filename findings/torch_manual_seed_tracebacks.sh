#!/usr/bin/env bash
# torch 2.15.0: each torch.manual_seed formats a traceback for every kind of device that the process does not use.
#
# The guess: on a machine without a GPU manual_seed sets the CPU's generator, a microsecond; what is lazy about devices is
# done once. Seen: CUDA, XPU and MTIA each note the call for the day when they are initialised, together with the formatted
# stack of the caller, again at every call (a later call replaces an earlier one: memory does not grow). So it costs more,
# the deeper the caller's stack is. Output, 2026-11-28:
#
#     tracebacks formatted by one torch.manual_seed: 3
#     microseconds: torch.manual_seed 76 (80 frames deep: 494), default_generator.manual_seed 1.0
#
# Who seeds in every step, to resume bit for bit, should seed the generators that the process draws from:
# torch.default_generator.manual_seed, and torch.cuda.manual_seed where there is a GPU.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$work/venv/bin/uv" pip install --quiet --python "$work/venv/bin/python" torch==2.15.0 numpy
cat > "$work/seed.py" <<'PY'
import time
import traceback

import torch


def deep(frames, function):
    return function() if frames == 0 else deep(frames - 1, function)


def microseconds(seed, calls=1000):
    start = time.process_time()
    for number in range(calls):
        seed(number)
    return 1e6 * (time.process_time() - start) / calls


torch.manual_seed(0)
formatted, counted = traceback.format_stack, []
traceback.format_stack = lambda *args: counted.append(1) or formatted(*args)
torch.manual_seed(0)
traceback.format_stack = formatted
print("tracebacks formatted by one torch.manual_seed:", len(counted))

whole, generator = microseconds(torch.manual_seed), microseconds(torch.default_generator.manual_seed)
from_deep = deep(80, lambda: microseconds(torch.manual_seed))
print(
    f"microseconds: torch.manual_seed {whole:.0f} (80 frames deep: {from_deep:.0f}),"
    f" default_generator.manual_seed {generator:.1f}"
)
torch.manual_seed(5)
numbers = torch.rand(3)
torch.default_generator.manual_seed(5)
assert torch.equal(torch.rand(3), numbers)
assert torch.__version__.startswith("2.15.0")
assert len(counted) == 3 and whole > 10 * generator and from_deep > 3 * whole, "the behaviour has changed"
PY
"$work/venv/bin/python" "$work/seed.py"
