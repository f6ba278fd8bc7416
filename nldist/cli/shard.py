"""Turn raw images into a data set of WebDataset shards, or index shards that somebody else wrote.

Examples:
    nldist shard folder raw/train data/birds --split train --resize 256
    nldist shard csv raw/noisy.csv data/shop --split train --root raw --path-column file
    nldist shard cifar raw/cifar-10-batches-py data/cifar10
    nldist shard digits data/digits
    nldist shard clothing1m raw/clothing1m data/clothing1m --resize 256
    nldist shard webvision raw/webvision data/webvision50 --classes 50 --part google --resize 256
    nldist shard ilsvrc12 raw/imagenet data/webvision50 --resize 256
    nldist shard animal10n raw/animal10n data/animal10n
    nldist shard webdataset 'elsewhere/train-{000..099}.tar' data/theirs --split train
"""

import argparse
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import get_args

from nldist.cli.options import Parser
from nldist.cli.published import PUBLISHED, add_published
from nldist.data.make.finish import Summary
from nldist.data.make.images import Check, Limits
from nldist.data.make.meaning import READINGS
from nldist.data.make.sources.base import Source, read_class_names
from nldist.data.make.sources.csv import CsvSource
from nldist.data.make.sources.folder import FolderSource
from nldist.data.make.sources.webdataset import IndexOptions, index_tars
from nldist.data.make.writer import WriteOptions, write_split
from nldist.data.manifest import known_classes, read_dataset
from nldist.errors import main_guard


@main_guard
def main(argv: list[str] | None = None) -> int:
    """Parse the command line and write the splits; 0 if all went well, 2 if the user must act."""
    arguments = parser().parse_args(argv)
    for split, run in _runs(arguments):
        start = time.perf_counter()
        summary = run()
        print(summary.report(arguments.out / split, time.perf_counter() - start))
    return 0


def _runs(arguments: argparse.Namespace) -> list[tuple[str, Callable[[], Summary]]]:
    """The splits to write, each with the call that writes it."""
    if arguments.layout == "webdataset":
        index = _index_options(arguments)
        return [(arguments.split, lambda: index_tars(arguments.tars, arguments.out, arguments.split, index))]
    options = write_options(arguments)
    sources = sources_of(arguments).items()
    return [(split, partial(write_split, source, arguments.out, split, options)) for split, source in sources]


def sources_of(arguments: argparse.Namespace) -> Mapping[str, Source]:
    """What each split is written from."""
    if arguments.layout in PUBLISHED:
        return PUBLISHED[arguments.layout].sources(arguments)
    source = _csv_source(arguments) if arguments.layout == "csv" else _folder_source(arguments)
    return {arguments.split: source}


def write_options(arguments: argparse.Namespace) -> WriteOptions:
    """How the splits are written."""
    return WriteOptions(
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        resize=arguments.resize,
        check=arguments.check,
        limits=Limits(arguments.max_pixels, arguments.max_bytes),
        on_bad=arguments.on_bad,
        num_workers=_num_workers(arguments),
        name=arguments.name,
    )


def _num_workers(arguments: argparse.Namespace) -> int:
    workers: int | None = arguments.workers
    return (os.cpu_count() or 1) if workers is None else workers


def _index_options(arguments: argparse.Namespace) -> IndexOptions:
    return IndexOptions(
        label_key=arguments.label_key,
        classes=_given_classes(arguments),
        limits=Limits(arguments.max_pixels, arguments.max_bytes),
        on_bad=arguments.on_bad,
        num_workers=_num_workers(arguments),
        name=arguments.name,
        reading=arguments.labels,
        image_key=arguments.image_key,
        keys=arguments.keys,
    )


def _given_classes(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    return None if arguments.classes is None else tuple(read_class_names(arguments.classes))


def _folder_source(arguments: argparse.Namespace) -> FolderSource:
    is_there = (arguments.out / "dataset.json").exists()
    known = tuple(read_dataset(arguments.out)["classes"]) if is_there else None
    return FolderSource(arguments.source, _given_classes(arguments), known)


def _csv_source(arguments: argparse.Namespace) -> CsvSource:
    classes = _given_classes(arguments) or known_classes(arguments.out, arguments.split)
    return CsvSource(
        file=arguments.file,
        root=arguments.root or arguments.file.parent,
        path_column=arguments.path_column,
        label_column=arguments.label_column,
        classes=None if classes is None else tuple(classes),
        reading=arguments.labels,
    )


def parser() -> Parser:
    """The command line."""
    parse = Parser(prog="nldist shard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts = parse.add_subparsers(dest="layout", required=True, metavar="LAYOUT")
    writing, general = _writing_options(), _general_options()
    split = Parser(add_help=False)
    split.add_argument("--split", required=True, help="name of the split, such as train or test")
    classes = Parser(add_help=False)
    classes.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line, in label order")
    labels = Parser(add_help=False)
    labels.add_argument("--labels", choices=READINGS, help="what numbers are, where they could be both")

    folder = layouts.add_parser(
        "folder", parents=[split, classes, writing, general], help="one sub-directory of images per class"
    )
    folder.add_argument("source", type=Path)
    table = layouts.add_parser(
        "csv", parents=[split, classes, labels, writing, general], help="a table with a path and a label per row"
    )
    table.add_argument("file", type=Path)
    table.add_argument("--root", type=Path, help="what the paths are relative to (default: the table's directory)")
    table.add_argument("--path-column", default="path")
    table.add_argument("--label-column", default="label", help="class names, or class indices from 0")
    add_published(layouts, [writing, general])
    tars = layouts.add_parser(
        "webdataset",
        parents=[split, classes, labels, general],
        help="tars somebody else wrote, indexed where they are",
    )
    tars.add_argument("tars", help="a quoted glob or a URL, brace ranges allowed")
    tars.add_argument(
        "--label-key",
        metavar="ENTRY",
        help="take labels from this entry of KEY.json, such as meta.label, not from KEY.cls",
    )
    tars.add_argument("--image-key", metavar="EXTENSION", help="which of several images to take, such as input.jpg")
    tars.add_argument(
        "--keys",
        choices=("webdataset", "filename"),
        default="webdataset",
        help="a key ends at a name's first dot, or (filename) at its last (%(default)s)",
    )
    for layout in layouts.choices.values():
        layout.add_argument("out", type=Path, help="the data set's directory; its other splits are kept")
    return parse


def _writing_options() -> Parser:
    options = Parser(add_help=False)
    options.add_argument("--shard-size", type=int, default=2000, metavar="N", help="images per shard (%(default)s)")
    options.add_argument("--seed", type=int, default=0, help="seed of the images' random order (%(default)s)")
    options.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="shrink images whose short side is longer to this short side; smaller images are left alone",
    )
    options.add_argument(
        "--check",
        choices=get_args(Check),
        default="decode",
        help="how a JPEG that stays as it is is checked: decoded, or only its header and its end (%(default)s)",
    )
    return options


def _general_options() -> Parser:
    limits = Limits()
    options = Parser(add_help=False)
    options.add_argument("--workers", type=int, help="processes; 0: only this one (default: number of cores)")
    options.add_argument("--name", help="the data set's name (default: as it is, or its directory's name)")
    options.add_argument(
        "--on-bad",
        choices=("refuse", "skip"),
        default="refuse",
        help="with bad images: refuse to make the split, or leave them out (%(default)s)",
    )
    options.add_argument(
        "--max-pixels", type=int, default=limits.max_pixels, metavar="N", help="more are bad (%(default)s)"
    )
    options.add_argument(
        "--max-bytes",
        type=int,
        default=limits.max_bytes,
        metavar="N",
        help="files above are bad (%(default)s)",
    )
    return options
