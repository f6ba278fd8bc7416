"""Labels and probabilities for images, by a run's networks.

nldist predict runs/mine photo.jpg photos/ 'more/*/*.png' --out predictions.parquet
nldist predict runs/mine shards/images-000000.tar --top 5 --out predictions.csv
nldist predict runs/mine data/mine --split train --probabilities --out train.parquet
nldist predict runs/mine photo.jpg   (a table in CSV, printed)
"""

import argparse
import os
import re
import sys
from pathlib import Path

from nldist.cli.options import Parser
from nldist.errors import main_guard

_SETTING = re.compile(r"\w+(\.\w+)+=")


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Predict; rank 0 says how many images there were."""
    parser = Parser(prog="nldist predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="IMAGE",
        help="files, directories, patterns, tars, or a data set (default: the run's); and settings as key=value",
    )
    parser.add_argument("--split", help="of a data set (default: the run's data.eval_split)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table, .parquet or .csv (default: CSV, printed)")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="tell the K most probable classes (default 1)")
    parser.add_argument("--probabilities", action="store_true", help="tell the probabilities of all classes (.parquet)")
    parser.add_argument("--weights", choices=("last", "best"), default="last")
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="shrink a longer short side (default: as the run's shards were)"
    )
    options = parser.parse_with_overrides(argv)
    from nldist.dist.environment import Place
    from nldist.train.predict import Request, predict

    images = [word for word in options.overrides if not _is_setting(word)]
    num_images, num_bad = predict(
        Request(
            options.run,
            images,
            options.split,
            options.out,
            options.top,
            options.probabilities,
            options.weights,
            options.resize,
            [word for word in options.overrides if word not in images],
        )
    )
    if Place.find().rank == 0:
        print(_summary(num_images, num_bad, options.out), file=sys.stderr)


def _is_setting(word: str) -> bool:
    return _SETTING.match(word) is not None and not os.path.lexists(word)


def _summary(num_images: int, num_bad: int, out: Path | None) -> str:
    told = f"{num_images:,} images" + (f": {out}" if out else "")
    if num_bad:
        told += f"; {num_bad:,} of them could not be read: the column error says why"
    return told
