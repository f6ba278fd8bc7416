"""The figures of a run: loss histograms with the fitted mixture, curves over training, confusion matrices."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nldist.files import replacing

# Okabe and Ito's palette: distinguishable with any colour vision.
BLUE, ORANGE, GREEN, PINK, RED, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#D55E00",
    "#56B4E9",
    "#000000",
)
NUM_BINS = 100
NUM_POINTS = 2000  # of a drawn density
MAX_MARKED_POINTS = 40  # a curve with more points goes without a mark on each
MAX_NAMED_CLASSES = 50  # more names cannot be read along an axis
MAX_PRINTED_CLASSES = 20  # more percentages cannot be read in the cells

Array = NDArray[np.float64]


def loss_histogram(
    path: Path,
    losses: ArrayLike,
    mixture: tuple[ArrayLike, ArrayLike, ArrayLike] | None,
    *,
    clean_mask: ArrayLike | None = None,
    tau: float,
    title: str,
) -> None:
    """Draw how the losses are distributed and where the mixture splits them (DivideMix, figure 2).

    `losses` (n,) are normalised to [0, 1]; `mixture` holds the means, variances and weights, (2,) each, of
    the two Gaussians fitted to them. Where `clean_mask` (n,) tells which labels are right, samples with right
    and with wrong labels are drawn apart. The dashed line is where the probability of the component with the
    smaller mean, which stands for clean labels, crosses `tau`.
    """
    losses = np.asarray(losses, dtype=np.float64)
    edges = np.linspace(min(0.0, losses.min(initial=0)), max(1.0, losses.max(initial=1)), NUM_BINS + 1)
    with _figure(path, title, (10, 6)) as axes:
        height = _draw_histogram(axes, losses, edges, clean_mask)
        if mixture is not None:
            _draw_mixture(axes, mixture, tau, edges)
        # The height follows the samples: a narrow component's density may be far higher.
        axes.set(xlabel="Normalised loss", ylabel="Density", xlim=(edges[0], edges[-1]), ylim=(0, 1.1 * height))
        axes.legend()


def curves(
    path: Path,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    ylabel: str,
    title: str,
    xlabel: str = "Epoch",
    bands: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
) -> None:
    """Draw named curves (x values, y values) over one axis. A value that is not finite leaves a gap.

    `bands` has (least, greatest) y values around some of them.
    """
    from matplotlib.ticker import MaxNLocator

    colours = [BLUE, ORANGE, GREEN, PINK, RED, SKY, BLACK]
    styles = [(colour, line) for line in ("-", "--", ":") for colour in colours]
    with _figure(path, title, (10, 6)) as axes:
        for (name, (xs, ys)), (colour, line) in zip(series.items(), cycle(styles), strict=False):
            marker = "o" if np.size(xs) <= MAX_MARKED_POINTS else None
            axes.plot(xs, ys, line, color=colour, marker=marker, markersize=4, linewidth=1.8, label=name)
            if bands and name in bands:
                axes.fill_between(xs, *bands[name], color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend()


def confusion(path: Path, matrix: ArrayLike, classes: Sequence[str], title: str = "") -> None:
    """Draw a confusion matrix, each row as shares of its true class.

    `matrix` (C, C) counts the samples of true class (row) and predicted class (column). A class without
    samples has an empty row.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    with _figure(path, title, (9, 8)) as axes:
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        axes.figure.colorbar(image, ax=axes, label="Share of the true class (in cells: %)", shrink=0.8)
        axes.set(xlabel="Predicted class", ylabel="True class")
        if len(classes) <= MAX_NAMED_CLASSES:
            size = 10 if len(classes) <= MAX_PRINTED_CLASSES else 7
            axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=size)
            axes.set_yticks(range(len(classes)), classes, fontsize=size)
        if len(classes) <= MAX_PRINTED_CLASSES:
            _print_shares(axes, shares)


def crossings(mixture: tuple[ArrayLike, ArrayLike, ArrayLike], tau: float, low: float, high: float) -> Array:
    """The losses in [low, high] where the probability of the component with the smaller mean crosses `tau`.

    Two Gaussians of unequal variance can have two such places: below the narrower one's mean the wider one
    may take over again.
    """
    grid = np.linspace(low, high, NUM_POINTS)
    densities = _densities(mixture, grid)
    total = densities.sum(axis=0)
    clean = np.divide(densities[0], total, out=np.zeros_like(total), where=total > 0)
    steps = np.flatnonzero(np.diff(clean > tau))
    return np.asarray((grid[steps] + grid[steps + 1]) / 2)


def _draw_histogram(axes: Any, losses: Array, edges: Array, clean_mask: ArrayLike | None) -> float:
    """Draw the samples' density, and return its greatest value; the two groups' areas add up to 1."""
    if clean_mask is None:
        groups = [("samples", BLUE, losses)]
    else:
        clean = np.asarray(clean_mask, dtype=bool)
        groups = [("clean labels", BLUE, losses[clean]), ("noisy labels", ORANGE, losses[~clean])]
    height = 0.0
    for name, colour, values in groups:
        density = np.histogram(values, edges)[0] / (max(len(losses), 1) * (edges[1] - edges[0]))
        label = f"{name} ({len(values):,})"
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.55, label=label)
        height = max(height, float(density.max()))
    return height or 1.0


def _draw_mixture(axes: Any, mixture: tuple[ArrayLike, ArrayLike, ArrayLike], tau: float, edges: Array) -> None:
    grid = np.linspace(edges[0], edges[-1], NUM_POINTS)
    densities = _densities(mixture, grid)
    for density, name, colour in zip(densities, ("clean", "noisy"), (GREEN, RED), strict=True):
        axes.plot(grid, density, color=colour, linewidth=2, label=f"{name} component")
    for place in crossings(mixture, tau, edges[0], edges[-1]):
        axes.axvline(place, color=BLACK, linestyle="--", linewidth=1.5)
    axes.plot([], [], color=BLACK, linestyle="--", linewidth=1.5, label=f"p(clean) = {tau:g}")


def _densities(mixture: tuple[ArrayLike, ArrayLike, ArrayLike], grid: Array) -> Array:
    """Weighted densities of the components at the grid's points, (2, points), the smaller mean first."""
    means, variances, weights = (np.asarray(part, dtype=np.float64).reshape(-1, 1) for part in mixture)
    densities = weights * np.exp(-((grid - means) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)
    return np.asarray(densities[np.argsort(means.ravel())])


def _print_shares(axes: Any, shares: Array) -> None:
    for row, column in np.argwhere(np.nan_to_num(shares) >= 0.005):
        share = shares[row, column]
        colour = "white" if share > 0.5 else BLACK
        axes.text(column, row, f"{share:.0%}".rstrip("%"), ha="center", va="center", color=colour, fontsize=8)


@contextmanager
def _figure(path: Path, title: str, inches: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on; what was drawn then replaces the file at `path` in one step, as PNG, 100 dots an inch.

    No pyplot: its figures are global, and stay in memory until they are closed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        figure.savefig(aside, format="png")
