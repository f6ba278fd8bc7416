"""A rehearsal at full size: 2.4 M tiny real JPEGs of 1,000 classes on two ranks, through all that nldist does.

    python benchmarks/rehearsal.py                    # or: make rehearsal; 0.24 M and 2.4 M
    python benchmarks/rehearsal.py --scale 0.01       # 2,400 and 24,000: whether it runs

Shard, labels, verify; plans, mixtures, an inverted file, forward correction's matrix; a whole run with a soft label of
all classes for every sample, and its audit; checkpoint, kill and resume; some steps of every method and stage. The
network is the smallest and images are 8 pixels wide: all but the network is measured. Seconds, peak memory of the
largest process, bytes on disk and state per sample of every part at both sizes, and what must hold at the larger one.

A part that is done is not done again: --work has what it came to. Needs some 25 GB there, of which 10 stay. Leaves
benchmarks/results/rehearsal-DATE.json.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record
from processes import Cost, bytes_below, run, run_ranks
from rehearsal_data import DIM, NUM_CLASSES
from rehearsal_runs import CLI, Runs

from nldist.errors import main_guard

HERE = Path(__file__).parent
SIZES = (240_000, 2_400_000)
Row = dict[str, Any]


@main_guard
def main() -> None:
    """Rehearse at each size; print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, nargs="+", default=SIZES, help="training images")
    parser.add_argument("--scale", type=float, default=1.0, help="of --num")
    parser.add_argument("--work", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--only", nargs="+", help="parts whose names begin so; nothing is recorded")
    options = parser.parse_args()
    sizes = [int(num * options.scale) for num in options.num]
    rows = {num: Rehearsal(options.work / str(num), num, options.only).all_parts() for num in sizes}
    show(rows)
    if options.only is None:
        checks = check(rows[max(sizes)]) | growth(rows)
        print(*(f"{'holds' if held else 'FAILS'}: {what}" for what, held in checks.items()), sep="\n")
        results = {"sizes": rows, "checks": checks}
        print(f"recorded in {record.write('rehearsal', ['torch', 'numpy', 'pyarrow'], results)}")


class Rehearsal:
    """The parts at one size, in the order in which they build on each other."""

    def __init__(self, folder: Path, num_samples: int, only: list[str] | None) -> None:
        self.folder, self._num, self._only = folder, num_samples, only
        self.images, self.data, self.log = folder / "images", folder / "data", folder / "log.txt"
        self._done = folder / "parts.json"
        self.rows: dict[str, Row] = json.loads(self._done.read_text()) if self._done.exists() else {}
        folder.mkdir(parents=True, exist_ok=True)

    def all_parts(self) -> dict[str, Row]:
        """What each of them came to, by name."""
        self._part("make images", lambda: _row(self._python("rehearsal_data.py", self.images, self._num)))
        self._part("shard", self._shard)
        self._part("noise", self._noise)
        for name in ("plans", "mixtures", "index"):
            self._part(name, partial(self._on_ranks, name))
        for name, call in Runs(self.folder, self.data, self._num, self.log).parts().items():
            self._part(name, call)
        self._part("transition", partial(self._on_ranks, "transition"))
        self._part("verify", lambda: _row(run(*CLI, "verify", self.data, "--workers", 2, log=self.log)))
        return self.rows

    def _part(self, name: str, call: Callable[[], Row]) -> None:
        chosen = self._only is None or name.startswith(tuple(self._only))
        if name in self.rows or not chosen:
            return
        print(f"{self._num:,}: {name} ...", flush=True)
        self.rows[name] = call()
        self._done.write_text(json.dumps(self.rows, indent=2) + "\n")
        print(f"  {json.dumps(self.rows[name])}", flush=True)

    def _python(self, script: str, *arguments: object) -> Cost:
        return run(HERE / script, *arguments, log=self.log)

    def _shard(self) -> Row:
        classes = ["--classes", self.images / "classes.txt", "--workers", 2]
        for split in ("test", "train"):
            tars = self.images / f"{split}-*.tar"
            cost = run(*CLI, "shard", "webdataset", tars, self.data, "--split", split, *classes, log=self.log)
        return _row(cost, disk_bytes=bytes_below(self.data), tars_bytes=bytes_below(self.images))

    def _noise(self) -> Row:
        model = ["--model", "symmetric", "--rate", 0.4, "--name", "sym40"]
        cost = run(*CLI, "noise", self.data, *model, log=self.log)
        return _row(cost, disk_bytes=bytes_below(self.data / "train" / "labels"))

    def _on_ranks(self, part: str) -> Row:
        out = self.folder / "out.json"
        cost = run_ranks(HERE / "rehearsal_ranks.py", part, self.data, out, log=self.log)
        # What the calls were given; see Runs for that of runs.
        rows = {"index": 4 * DIM, "transition": 2 * NUM_CLASSES}.get(part, 0)
        return _row(cost, calls=json.loads(out.read_text()), table_mib=rows * self._num / 2 / 2**20)


def _row(cost: Cost, **more: Any) -> Row:
    return {"seconds": round(cost.seconds, 2), "peak_mib": round(cost.peak_mib), **more}


def show(rows: dict[int, dict[str, Row]]) -> None:
    """Print a table: of each part what there is at each size."""
    for num, parts in rows.items():
        print(f"\n{num:,} images{'':16}  seconds  peak MiB  disk MiB  state B/sample")
        for name, row in parts.items():
            disk, state = row.get("disk_bytes"), row.get("state_bytes")
            numbers = f"{row['seconds']:8.1f}  {row['peak_mib']:8,.0f}  "
            numbers += f"{disk / 2**20:8,.0f}  " if disk is not None else f"{'':8}  "
            print(f"{name:30}  {numbers}{state if state is not None else ''}")
            for call, seconds in row.get("calls", {}).items():
                print(f"  {call:28}  {seconds:8.2f}")


def check(parts: dict[str, Row]) -> dict[str, bool]:
    """What must hold at 2.4 M images, by what it is."""
    rest = {name: row["peak_mib"] - row.get("table_mib", 0) for name, row in parts.items() if name != "make images"}
    worst = max(rest, key=lambda name: rest[name])
    resume, plans, mixtures = (parts[name]["calls"] for name in ("resume", "plans", "mixtures"))
    plan, mixture = max(plans.values()), max(mixtures.values())
    build, table = parts["index"]["calls"]["index build"], parts["selc, whole run"]["table_bytes"]
    return {
        f"{rest[worst]:,.0f} MiB per process beside soft labels and features, at most ({worst}) < 1.5 GB": rest[worst]
        < 1431,
        f"index built in {build:.1f} s < 60 s": build < 60,
        f"an epoch's plan in {plan:.2f} s < 5 s": plan < 5,
        f"mixture in {mixture:.2f} s < 5 s": mixture < 5,
        f"resumed in {resume['resume']:.1f} s < 60 s": resume["resume"] < 60,
        f"soft labels take {table / 1e9:.2f} GB over all ranks < 5.5 GB": table < 5.5e9,
    }


def growth(rows: dict[int, dict[str, Row]]) -> dict[str, bool]:
    """Whether a part, or a call of a second or more, takes over 1.3 times as much longer as there are more images."""
    if len(rows) < 2:
        return {}
    small, large = min(rows), max(rows)
    before, after = _seconds(rows[small]), _seconds(rows[large])
    found = {
        f"{name} takes {after[name] / before[name]:.1f} times as long for {large / small:.0f} times the images": False
        for name in sorted(before.keys() & after.keys())
        if after[name] > max(1.0, 1.3 * large / small * before[name])
    }
    return found or {f"no part grows worse than the number of images ({small:,} to {large:,})": True}


def _seconds(parts: dict[str, Row]) -> dict[str, float]:
    """Of all parts and their calls, by name."""
    calls = {f"{name}: {call}": value for name, row in parts.items() for call, value in row.get("calls", {}).items()}
    return calls | {name: row["seconds"] for name, row in parts.items()}


if __name__ == "__main__":
    sys.exit(main())
