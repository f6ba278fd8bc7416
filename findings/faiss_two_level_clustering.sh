#!/usr/bin/env bash
# faiss-cpu 1.15.1: faiss.contrib.clustering.two_level_clustering fails on some data that faiss.Kmeans takes.
#
# The guess: it gives each first cluster as many of the wanted centres as it has points, and leaves out those with too
# few points for one. Seen: it asks Kmeans for no centres there, which is refused. With rebalance=False it asks every
# first cluster for as many, and fails where one has fewer points than that. Output, 2026-11-28, 4,000 points of which
# 3,990 are the same:
#
#     Kmeans: 100 centres
#     two_level_clustering: Error: 'clus.k > 0 && clus.max_points_per_centroid > 0' failed
#     two_level_clustering, rebalance=False: Error: 'nx >= static_cast<idx_t>(k)' failed
#
# Features of a data set with one picture in many copies are such points.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$work/venv/bin/uv" pip install --quiet --python "$work/venv/bin/python" faiss-cpu==1.15.1 numpy scipy
"$work/venv/bin/python" - 2>/dev/null <<'PY'
import re

import faiss
import numpy as np
from faiss.contrib.clustering import two_level_clustering

random = np.random.default_rng(0)
points = np.concatenate([np.tile(random.standard_normal((1, 16)), (3990, 1)), random.standard_normal((10, 16))])
points = points.astype(np.float32)
one = faiss.Kmeans(16, 100)
one.train(points)
print(f"Kmeans: {len(one.centroids)} centres")
seen = []
for name, settings in (("", {}), (", rebalance=False", {"rebalance": False})):
    try:
        two_level_clustering(points, 10, 100, **settings)
        seen.append("no error")
    except RuntimeError as error:
        seen.append("Error: " + re.search(r"'.*?' failed", str(error))[0])
    print(f"two_level_clustering{name}: {seen[-1]}")
assert faiss.__version__.startswith("1.15.1")
assert "clus.k > 0" in seen[0] and "clus.k" in seen[1], "the behaviour has changed"
PY
