#!/usr/bin/env bash
# torch 2.15.0, CPU: batch norm in train mode is up to four digits less exact in channels_last than in contiguous memory.
#
# The guess: statistics of float32 images agree to about 1e-6 whatever the memory format, as sums over whole batches are
# pairwise or in float64. Seen: in contiguous memory the variance of a batch is right to 1e-7 for any size; in
# channels_last each thread sums its rows one by one in float32, so the error grows with batch x height x width: 3e-5 at
# 128 x 32 x 32, 3e-3 at 256 x 112 x 112 on one thread, and running_var inherits it. Output on one thread, 2026-11-27:
#
#      128 x  32 x  32  contiguous 6.3e-08  channels_last 2.7e-05
#       64 x 112 x 112  contiguous 7.6e-08  channels_last 3.9e-04
#      256 x 112 x 112  contiguous 5.9e-08  channels_last 2.9e-03
#
# Who compares a CPU reference with a GPU, or one memory format with the other, meets this and not a fault of the model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$work/venv/bin/uv" pip install --quiet --python "$work/venv/bin/python" torch==2.15.0 numpy
"$work/venv/bin/python" - <<'PY'
import torch

torch.set_num_threads(1)
torch.manual_seed(0)
errors = {}
for batch, side in ((128, 32), (64, 112), (256, 112)):
    images = torch.randn(batch, 8, side, side) + 1
    exact = images.double().var((0, 2, 3))
    for name in ("contiguous", "channels_last"):
        norm = torch.nn.BatchNorm2d(8, momentum=1.0)
        norm(images.contiguous(memory_format=getattr(torch, f"{name}_format" if name == "contiguous" else name)))
        errors[name] = (norm.running_var.double() / exact - 1).abs().max().item()
    print(f"{batch:4} x {side:3} x {side:3}  " + "  ".join(f"{name} {error:.1e}" for name, error in errors.items()))
assert torch.__version__.startswith("2.15.0")
assert errors["contiguous"] < 1e-6 < 1e-3 < errors["channels_last"], "the behaviour has changed"
PY
