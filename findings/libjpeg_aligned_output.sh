#!/usr/bin/env bash
# simplejpeg 1.9.0 (libjpeg-turbo 3 within), Linux, x86-64 with AVX2: small JPEGs decode slower into aligned memory.
#
# The guess: where the pixels are put does not matter, and if it does, memory that begins at a multiple of 32 or 64 bytes,
# as torch.empty's always does, is the faster. Seen: the other way round. Where the output begins at a multiple of 32
# bytes, libjpeg-turbo's colour conversion writes past the cache, and a row of 32 pixels, 96 bytes, is one and a half
# cache lines: decoding 32 x 32 pixels takes up to twice as long. 16 bytes further on it does not. At 256 pixels a row is
# whole lines, and there is hardly a difference.
# Output, 2026-11-28, an Intel Xeon (medians of 15):
#
#     32 x 32: 20.2 microseconds into aligned memory, 10.5 into memory 16 bytes further on, ratio 1.92
#     256 x 256: ratio 1.05
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.9.7
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" simplejpeg==1.9.0 numpy==2.4.6
grep -q avx2 /proc/cpuinfo || { echo "this processor has no AVX2"; exit 1; }
"$folder/venv/bin/python" - <<'PY'
import statistics
import time

import numpy as np
import simplejpeg


def seconds(side: int, off: int, repeats: int) -> float:
    """CPU seconds of decoding one JPEG of smooth noise into memory that begins `off` bytes after a multiple of 64."""
    coarse = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), np.uint8)
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(coarse.repeat(4, 0).repeat(4, 1)), quality=90)
    room = np.empty(side * side * 3 + 128, np.uint8)
    begin = -room.ctypes.data % 64 + off
    out = room[begin : begin + side * side * 3].reshape(side, side, 3)
    started = time.process_time()
    for _ in range(repeats):
        simplejpeg.decode_jpeg(data, buffer=out)
    return (time.process_time() - started) / repeats


def medians(side: int, repeats: int) -> tuple[float, float]:
    """Into aligned memory, and into memory 16 bytes further on, taking turns."""
    turns = [(seconds(side, 0, repeats), seconds(side, 16, repeats)) for _ in range(15)]
    aligned, off = (statistics.median(column) for column in zip(*turns))
    return aligned, off


aligned, off = medians(32, 2000)
text = f"{1e6 * aligned:.1f} microseconds into aligned memory, {1e6 * off:.1f} into memory 16 bytes further on"
print(f"32 x 32: {text}, ratio {aligned / off:.2f}")
large, large_off = medians(256, 50)
print(f"256 x 256: ratio {large / large_off:.2f}")
assert aligned > 1.15 * off
assert large < 1.1 * large_off
PY
