#!/usr/bin/env bash
# torch 2.15.0, CPU: scatter_ into a float16 tensor makes a float32 copy of the whole tensor.
#
# The guess: x.scatter_(1, places, 1) writes one number a row where it is, whatever the type. Seen: for float16 the
# process grows by twice x's size while it runs, and back; for float32 it does not grow. x[rows, places] = 1, which
# writes the same, does not in either. Output, 2026-11-28, x of 100,000 x 1,000:
#
#     float16: x 191 MiB, scatter_ 383 MiB more, x[rows, places] 1 MiB more
#     float32: x 381 MiB, scatter_ 0 MiB more, x[rows, places] 0 MiB more
#
# A table of 2.4 million soft labels of 1,000 classes, 4.8 GB in float16 to save memory, needed 9.6 GB more to begin.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$work/venv/bin/uv" pip install --quiet --python "$work/venv/bin/python" torch==2.15.0 numpy
"$work/venv/bin/python" - <<'PY'
from pathlib import Path

import torch


def growth(call):
    """MiB by which this process was larger at most during a call than before it."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux's high-water mark begins anew
    before = kib("VmRSS")
    call()
    return (kib("VmHWM") - before) / 1024


def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))


torch.set_num_threads(1)
rows, places = torch.arange(100_000), torch.randint(1000, (100_000,))
found = {}
for dtype in (torch.float16, torch.float32):
    x = torch.full((100_000, 1_000), 0, dtype=dtype)
    scatter = growth(lambda: x.scatter_(1, places[:, None], 1))
    put = growth(lambda: x.__setitem__((rows, places), 1))
    found[dtype] = scatter
    size = x.nbytes / 2**20
    print(f"{str(dtype)[6:]}: x {size:.0f} MiB, scatter_ {scatter:.0f} MiB more, x[rows, places] {put:.0f} MiB more")
    assert put < 32
assert torch.__version__.startswith("2.15.0")
assert found[torch.float16] > 350 > 32 > found[torch.float32], "the behaviour has changed"
PY
