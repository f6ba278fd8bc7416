"""The layouts of `nldist shard` that are published data sets, all of whose splits are written by one command."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from nldist.data.make.sources import animal10n, cifar, clothing1m, digits, food101n, ilsvrc12, webvision
from nldist.data.make.sources.base import Source


class Published(NamedTuple):
    """A published data set: what help says of it, the files that it must have, and its splits."""

    help: str
    layout: tuple[str, ...]
    sources: Callable[[argparse.Namespace], Mapping[str, Source]]


def _is_partial(arguments: argparse.Namespace) -> bool:
    return bool(arguments.on_bad == "skip")


PUBLISHED = {
    "cifar": Published(
        "CIFAR-10 or CIFAR-100 (fine labels), Python distribution",
        cifar.LAYOUT,
        lambda arguments: cifar.sources(arguments.directory),
    ),
    "clothing1m": Published(
        "Clothing1M: train, clean_train, val, test, both",
        clothing1m.LAYOUT,
        lambda arguments: clothing1m.sources(arguments.directory, _is_partial(arguments)),
    ),
    "webvision": Published(
        "WebVision 1.0, original or resized, or its first classes: train, val",
        webvision.LAYOUT,
        lambda arguments: webvision.sources(
            arguments.directory, arguments.num_classes, arguments.part, _is_partial(arguments)
        ),
    ),
    "ilsvrc12": Published(
        "ILSVRC12's validation images as a further split of a WebVision data set",
        ilsvrc12.LAYOUT,
        lambda arguments: ilsvrc12.sources(arguments.directory, arguments.out),
    ),
    "animal10n": Published(
        "Animal-10N, images or binary files: train, test",
        animal10n.LAYOUT,
        lambda arguments: animal10n.sources(arguments.directory),
    ),
    "food101n": Published(
        "Food-101N, with Food-101's test images: train, test",
        food101n.LAYOUT,
        lambda arguments: food101n.sources(arguments.directory, arguments.food101, _is_partial(arguments)),
    ),
    "digits": Published(
        "scikit-learn's 1,797 digits of 8x8 pixels", (), lambda arguments: digits.sources()
    ),
}  # fmt: skip


def add_published(layouts: "argparse._SubParsersAction", parents: list[argparse.ArgumentParser]) -> None:
    """Add a parser for each published data set."""
    for name, data in PUBLISHED.items():
        what = "\n".join([data.help, *(["", "DIRECTORY holds:"] if data.layout else []), *data.layout])
        parser = layouts.add_parser(
            name,
            parents=parents,
            help=data.help,
            description=what,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if data.layout:
            parser.add_argument("directory", type=Path)
        if name == "webvision":
            parser.add_argument(
                "--classes",
                dest="num_classes",
                type=int,
                metavar="N",
                help="the first N only, such as 50 (default: all)",
            )
            parser.add_argument(
                "--part", choices=webvision.PARTS, default="all", help="training images from where (%(default)s)"
            )
        if name == "food101n":
            parser.add_argument(
                "--food101", type=Path, metavar="DIRECTORY", help="Food-101 (default: food-101, in or beside DIRECTORY)"
            )
