from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.mixture import GaussianMixture

from nldist.report import plots
from nldist.report.plots import confusion, crossings, curves, loss_histogram

RNG = np.random.default_rng(0)
CLEAN = RNG.random(4000) < 0.6
LOSSES = np.where(CLEAN, RNG.beta(2, 20, 4000), RNG.beta(6, 6, 4000))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every figure that is saved."""
    axes: list[Any] = []
    save = Figure.savefig

    def spy(figure: Figure, *args: Any, **options: Any) -> None:
        axes.append(figure.axes[0])
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return axes


def fitted() -> tuple[GaussianMixture, tuple[Any, Any, Any]]:
    model = GaussianMixture(2, random_state=0).fit(LOSSES[:, None])
    return model, (model.means_, model.covariances_, model.weights_)


@pytest.mark.parametrize("tau", [0.2, 0.5, 0.9])
def test_the_threshold_is_where_the_posterior_crosses_tau(tau: float) -> None:
    model, mixture = fitted()
    places = crossings(mixture, tau, 0.0, 1.0)
    assert len(places) >= 1
    clean = int(np.argmin(model.means_))
    step = 1 / plots.NUM_POINTS
    for place in places:
        before, after = model.predict_proba([[place - step], [place + step]])[:, clean]
        assert min(before, after) < tau < max(before, after)


def test_the_wider_component_can_take_over_on_both_sides() -> None:
    places = crossings(([0.3, 0.5], [0.001, 0.1], [0.5, 0.5]), 0.5, 0.0, 1.0)
    assert len(places) == 2
    assert places[0] < 0.3 < places[1]
    swapped = crossings(([0.5, 0.3], [0.1, 0.001], [0.5, 0.5]), 0.5, 0.0, 1.0)
    np.testing.assert_array_equal(places, swapped)


def test_the_histogram_is_a_density_on_the_scale_of_the_mixture(tmp_path: Path, drawn: list[Any]) -> None:
    _, mixture = fitted()
    path = tmp_path / "plots/losses.png"
    loss_histogram(path, LOSSES, mixture, clean_mask=CLEAN, tau=0.5, title="Losses")
    (axes,) = drawn
    areas = [float(patch.get_data().values.sum() / plots.NUM_BINS) for patch in axes.patches]
    assert areas == pytest.approx([CLEAN.mean(), 1 - CLEAN.mean()])
    curves_drawn = [line for line in axes.lines if len(line.get_xdata()) == plots.NUM_POINTS]
    total = sum(np.trapezoid(line.get_ydata(), line.get_xdata()) for line in curves_drawn)
    assert total == pytest.approx(1, abs=0.03)  # the Gaussians' tails reach beyond [0, 1]
    means = [np.average(line.get_xdata(), weights=line.get_ydata()) for line in curves_drawn]
    assert means[0] < means[1]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0] == f"clean labels ({CLEAN.sum():,})"
    assert labels[2:] == ["clean component", "noisy component", "p(clean) = 0.5"]
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (1000, 600))
    assert [file.name for file in path.parent.iterdir()] == ["losses.png"]


def test_the_histogram_needs_neither_mask_nor_mixture(tmp_path: Path, drawn: list[Any]) -> None:
    loss_histogram(tmp_path / "a.png", LOSSES, None, tau=0.5, title="")
    loss_histogram(tmp_path / "b.png", [], None, tau=0.5, title="")
    assert [len(axes.patches) for axes in drawn] == [1, 1]
    assert len(drawn[0].lines) == 0


def test_curves_are_told_apart(tmp_path: Path, drawn: list[Any]) -> None:
    xs = np.arange(5)
    curves(tmp_path / "a.png", {f"run {k}": (xs, xs * k) for k in range(20)}, "Accuracy", "Test")
    curves(tmp_path / "b.png", {"one": ([3], [0.5])}, "Accuracy", "Test")
    lines = drawn[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    np.testing.assert_array_equal(lines[7].get_ydata(), xs * 7)
    assert (drawn[0].get_xlabel(), drawn[0].get_ylabel()) == ("Epoch", "Accuracy")
    assert drawn[1].lines[0].get_marker() == "o"  # a line through one point would not be seen


def test_confusion_shows_shares_of_the_true_class(tmp_path: Path, drawn: list[Any]) -> None:
    confusion(tmp_path / "a.png", [[8, 2, 0], [0, 0, 0], [1, 0, 999]], ["a", "b", "c"])
    (axes,) = drawn
    cells = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "80", (0, 1): "20", (2, 2): "100"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.get_ylabel() == "True class"
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    np.testing.assert_allclose(shown, [[0.8, 0.2, 0], [np.nan] * 3, [0.001, 0, 0.999]])


def test_many_classes_are_drawn_without_names(tmp_path: Path, drawn: list[Any]) -> None:
    confusion(tmp_path / "a.png", np.eye(200), [f"class {k}" for k in range(200)])
    assert "class 0" not in [label.get_text() for label in drawn[0].get_xticklabels()]
    assert not drawn[0].texts


def test_a_plot_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    curves(path, {"a": ([1, 2], [1, 2])}, "y", "first")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="same first dimension"):
        curves(path, {"a": ([1, 2], [1, 2, 3])}, "y", "second")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
