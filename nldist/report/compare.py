"""A table of runs that have ended."""

from pathlib import Path
from typing import Any

from nldist.errors import UserError
from nldist.run.status import read_summary


def compare(run_dirs: list[Path]) -> list[dict[str, Any]]:
    """One row per run that has ended: method, accuracy best and last, split AUC, images per second, world size."""
    rows = []
    for run_dir in run_dirs:
        summary = read_summary(run_dir)
        if summary is None:
            raise UserError(f"{run_dir} has no summary.json: it is no run, or has not ended")
        if summary["stage"] != "train":
            raise UserError(f"{run_dir} holds the stage {summary['stage']} of a run, which predicts no classes")
        rows.append(
            {
                "method": summary["method"],
                "best": summary["accuracy"]["best"],
                "last": summary["accuracy"]["last"],
                "split_auc": (summary["split"] or {}).get("auc"),
                "images_per_second": summary["images_per_second"],
                "world_size": summary["world_size"],
            }
        )
    return rows


def table(run_dirs: list[Path], rows: list[dict[str, Any]]) -> str:
    """The rows of `compare` as aligned text; runs of one method are told apart by their directories."""
    lines = [("method", "best %", "last %", "split AUC", "images/s", "ranks")]
    methods = [row["method"] for row in rows]
    for run_dir, row in zip(run_dirs, rows, strict=True):
        auc = "-" if row["split_auc"] is None else f"{row['split_auc']:.3f}"
        lines.append(
            (
                row["method"] if methods.count(row["method"]) == 1 else str(run_dir),
                f"{row['best']:.2f}",
                f"{row['last']:.2f}",
                auc,
                f"{row['images_per_second']:,.0f}",
                str(row["world_size"]),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_align(line, widths) for line in lines)


def _align(cells: tuple[str, ...], widths: list[int]) -> str:
    """The first cell to the left, the others to the right."""
    first, *rest = cells
    return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))])
