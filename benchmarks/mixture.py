"""Time our two-component mixture against scikit-learn's on one process, in one run, taking turns.

OMP_NUM_THREADS=2 python benchmarks/mixture.py
"""

import argparse
import time
import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import record
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from nldist.dist.world import World
from nldist.estimate.mixture import Mixture, fit, normalise

NOISE_RATES = (0.2, 0.4, 0.8)


def losses(num_samples: int, noise_rate: float) -> np.ndarray:
    """Normalised losses (N,) as after warm-up: clean ones near zero with a tail, wrong ones further out."""
    random = np.random.default_rng(0)
    noisy = random.random(num_samples) < noise_rate
    values = np.where(noisy, random.gamma(6, 0.6, num_samples), random.exponential(0.4, num_samples))
    return normalise(values.astype(np.float32), World.single())


def fit_ours(values: np.ndarray) -> Mixture:
    """Our fit."""
    mixture = fit(values, World.single())
    assert mixture is not None
    return mixture


def fit_reference(values: np.ndarray) -> GaussianMixture:
    """The published methods' call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
        return model.fit(values[:, None])


def seconds(function: Callable[[np.ndarray], object], values: np.ndarray) -> tuple[float, float]:
    """Wall-clock time of one call, and CPU time of all its threads, which a busy machine distorts less."""
    wall, cpu = time.perf_counter(), time.process_time()
    function(values)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(num_samples: int, noise_rate: float, num_repeats: int) -> dict[str, float]:
    """One row: median times over repeats in turn, iterations, and how far the two fits are apart."""
    values = losses(num_samples, noise_rate)
    mixture, model = fit_ours(values), fit_reference(values)
    turns = [seconds(fit_ours, values) + seconds(fit_reference, values) for _ in range(num_repeats)]
    ours, cpu_ours, theirs, cpu_theirs = (median(column) for column in zip(*turns, strict=True))
    clean = model.predict_proba(values[:, None])[:, model.means_.argmin()]
    flips = np.count_nonzero((mixture.clean_probability(values) > 0.5) != (clean > 0.5))
    return {
        "num_samples": num_samples,
        "noise_rate": noise_rate,
        "seconds": ours,
        "seconds_scikit_learn": theirs,
        "cpu_seconds": cpu_ours,
        "cpu_seconds_scikit_learn": cpu_theirs,
        "iterations": mixture.num_iterations,
        "iterations_scikit_learn": model.n_iter_,
        "max_difference_of_means": float(np.abs(mixture.means - np.sort(model.means_.ravel())).max()),
        "share_of_other_decisions": flips / num_samples,
    }


def main() -> None:
    """Measure, print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-samples", type=int, default=2_400_000)
    parser.add_argument("--num-repeats", type=int, default=7)
    args = parser.parse_args()
    rows = [compare(args.num_samples, rate, args.num_repeats) for rate in NOISE_RATES]
    header = (
        "noise",
        "wall s",
        "sklearn",
        "CPU s",
        "sklearn",
        "iterations",
        "means differ",
        "other decisions",
    )
    print("".join(f"{name:>17}" for name in header))
    for row in rows:
        iterations = f"{row['iterations']} / {row['iterations_scikit_learn']}"
        columns = ("seconds", "seconds_scikit_learn", "cpu_seconds", "cpu_seconds_scikit_learn")
        times = "".join(f"{row[name]:17.3f}" for name in columns)
        apart = f"{row['max_difference_of_means']:17.1e}{row['share_of_other_decisions']:17.4%}"
        print(f"{row['noise_rate']:17.1f}{times}{iterations:>17}{apart}")
    path = record.write("mixture", ["numpy", "scikit-learn", "torch"], {"rows": rows})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
