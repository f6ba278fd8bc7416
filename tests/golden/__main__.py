"""Records of the losses by step.

    python -m tests.golden renew [RUN ...]    # write tests/golden/*.json anew, on purpose
    python -m tests.golden record FOLDER      # the exact values of this commit
    python -m tests.golden compare ONE OTHER  # two such folders, bit for bit: the first step that differs

To compare with another commit: `git worktree add ../other COMMIT`, and there, with this environment's Python,
`PYTHONPATH=. python -m tests.golden record FOLDER`, on the same machine.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch

from tests.conftest import make_digits
from tests.golden.runs import FOLDER, RUNS, SIZES, first_difference, run, write


def main() -> int:
    """Run one command; 1 where two records differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("renew").add_argument("names", nargs="*", metavar="RUN", choices=[*RUNS, []])
    commands.add_parser("record").add_argument("folder", type=Path)
    compare = commands.add_parser("compare")
    compare.add_argument("one", type=Path)
    compare.add_argument("other", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        return _compare(options.one, options.other)
    target = FOLDER if options.command == "renew" else options.folder
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        data = make_digits(Path(work) / "data")
        for name in getattr(options, "names", None) or RUNS:
            for size in SIZES:
                losses = run(name, size, data, Path(work))
                file = target / f"{name}-{size}.json"
                if options.command == "renew":
                    write(file, losses, {"torch": torch.__version__, "machine": platform.machine()})
                else:
                    file.write_text(json.dumps(losses))
                print(f"{file}: {sum(map(len, losses.values()))} values", flush=True)
    return 0


def _compare(one: Path, other: Path) -> int:
    differ = 0
    for file in sorted(other.glob("*.json")):
        got, want = (json.loads((folder / file.name).read_text()) for folder in (one, other))
        difference = first_difference(got, want, tolerance=0)
        print(f"{file.name}: {difference or 'identical'}")
        differ |= difference is not None
    return differ


if __name__ == "__main__":
    sys.exit(main())
