"""Finished runs side by side: a row and a curve for each method, over its seeds."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nldist.config.marks import deciding
from nldist.errors import UserError
from nldist.report import plots
from nldist.run.directory import RunDirectory
from nldist.run.status import METRICS_FILE, read_summary

_SEED = "run.seed"
_NAME = "method.name"
_TEST = "data.test_split"  # no setting that decides, but one that tells accuracies apart
_ALONE = "run"  # the directory of a run whose settings are not known
_HEAD = ("method", "seeds", "best %", "last %", "test %", "split AUC", "seconds", "images/s", "ranks")


@dataclass(frozen=True)
class Finished:
    """A run that has ended: its directory, its summary, and the settings that decided about it but for the seed."""

    path: Path
    summary: dict[str, Any]
    settings: Mapping[str, Any]

    def curve(self) -> dict[int, float]:
        """Accuracy in percent by epoch, for those in which it was measured."""
        try:
            records = list(map(json.loads, (self.path / METRICS_FILE).read_text().splitlines()))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / METRICS_FILE} cannot be read: {error}") from None
        # Of an epoch that was done twice, on another number of ranks, the run went on from the later one.
        return {
            record["epoch"]: record["accuracy"]
            for record in records
            if record["kind"] == "epoch" and record.get("accuracy") is not None
        }


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seeds."""

    name: str
    runs: list[Finished]


def read(run_dir: Path) -> Finished:
    """A run that has ended.

    Raises:
        UserError: it is none, or a stage before the training.
    """
    summary = read_summary(run_dir)
    if summary is None:
        raise UserError(f"{run_dir} has no summary.json: it is no run, or has not ended")
    if summary["stage"] != "train":
        raise UserError(f"{run_dir} holds the stage {summary['stage']} of a run, which predicts no classes")
    try:
        settings = deciding(RunDirectory(run_dir).config())
    except UserError:  # of a release with other settings: it stands alone
        settings = {_NAME: summary["method"], _ALONE: str(run_dir)}
    tested = (summary.get("test") or {}).get("split")
    settings = {"data set": summary["data_set"], _TEST: tested} | {
        key: value for key, value in settings.items() if key != _SEED
    }
    return Finished(run_dir, summary, settings)


def grouped(runs: Iterable[Finished]) -> list[Group]:
    """The runs by their settings, in the order of the first of each.

    A group is called after its method, and where several have the same one also after what they differ in.
    """
    found: dict[str, list[Finished]] = {}
    for run in runs:
        found.setdefault(json.dumps(dict(run.settings), sort_keys=True), []).append(run)
    return [Group(_name(own[0], [other[0] for other in found.values()]), own) for own in found.values()]


def _name(run: Finished, others: Sequence[Finished]) -> str:
    method = run.settings[_NAME]
    if _ALONE in run.settings:
        return f"{method} {run.settings[_ALONE]}"
    alike = [other.settings for other in others if other.settings[_NAME] == method and _ALONE not in other.settings]
    differing = {key for settings in alike for key in settings if any(s.get(key) != settings[key] for s in alike)}
    return " ".join([method, *(f"{key}={run.settings.get(key)}" for key in sorted(differing))])


def row(group: Group) -> dict[str, Any]:
    """Means over a group's seeds, and the sample deviations of accuracies (percent; None of one run)."""
    summaries = [run.summary for run in group.runs]
    values: dict[str, Any] = {"method": group.name, "seeds": [summary.get("seed") for summary in summaries]}
    for name in ("best", "last"):
        scores = [summary["accuracy"][name] for summary in summaries]
        values |= {name: statistics.fmean(scores), f"{name}_deviation": _deviation(scores)}
    tested = [summary["test"]["chosen"]["accuracy"] for summary in summaries if summary.get("test")]
    values |= {
        "test": statistics.fmean(tested) if tested else None,
        "test_deviation": _deviation(tested),
    }
    areas = [summary["split"]["auc"] for summary in summaries if (summary["split"] or {}).get("auc") is not None]
    values["split_auc"] = statistics.fmean(areas) if areas else None
    for name in ("seconds", "images_per_second"):
        values[name] = statistics.fmean(summary[name] for summary in summaries)
    values["world_size"] = sorted({summary["world_size"] for summary in summaries})
    return values | {"runs": [str(run.path) for run in group.runs]}


def _deviation(scores: Sequence[float]) -> float | None:
    return statistics.stdev(scores) if len(scores) > 1 else None


def _cells(values: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        values["method"],
        str(len(values["seeds"])),
        *(_with_deviation(values[name], values[f"{name}_deviation"]) for name in ("best", "last")),
        "-" if values["test"] is None else _with_deviation(values["test"], values["test_deviation"]),
        "-" if values["split_auc"] is None else f"{values['split_auc']:.3f}",
        f"{values['seconds']:,.0f}",
        f"{values['images_per_second']:,.0f}",
        ",".join(map(str, values["world_size"])),
    )


def _with_deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def as_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as aligned text."""
    lines = _lines(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_align(line, widths) for line in lines)


def _lines(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """The head, and the rows' cells, without the column of the test split where no run has one."""
    rows = list(rows)
    without = None if any(values["test"] is not None for values in rows) else _HEAD.index("test %")
    return [[cell for n, cell in enumerate(line) if n != without] for line in (_HEAD, *map(_cells, rows))]


def _align(cells: Sequence[str], widths: list[int]) -> str:
    """The first cell to the left, the others to the right."""
    first, *rest = cells
    return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])


def as_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    head, *body = _lines(rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


def draw(path: Path, groups: Iterable[Group]) -> None:
    """Accuracy by epoch: each group's mean, and what lies between its least and greatest run, as a PNG."""
    series, bands = {}, {}
    for group in groups:
        curves = [run.curve() for run in group.runs]
        epochs = sorted(set.intersection(*map(set, curves)))
        values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
        series[group.name] = (epochs, values.mean(0))
        if len(curves) > 1:
            bands[group.name] = (values.min(0), values.max(0))
    plots.curves(
        path,
        series,
        "Accuracy, %",
        "Accuracy by epoch" + (", mean and range of the seeds" if bands else ""),
        bands=bands,
    )
