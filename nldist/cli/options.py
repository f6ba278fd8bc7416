"""What several commands' options share."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from nldist.errors import UserError


class Parser(argparse.ArgumentParser):
    """Errors are one line, with the nearest option where one is misspelt."""

    def error(self, message: str) -> NoReturn:
        """See ArgumentParser."""
        raise UserError(f"{message}; see {self.prog} --help")

    def parse_with_overrides(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Options may stand before, between and after the `overrides`."""
        options, rest = self.parse_known_args(argv)
        for word in rest:
            if word.startswith("-"):
                near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
                raise UserError(
                    f"unknown option {word}" + (f"; did you mean {near[0]}?" if near else f"; see {self.prog} --help")
                )
        options.overrides += rest
        return options


def add_configuration(parser: Parser) -> None:
    """A configuration file and overrides of its settings."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/demo.yaml")
    add_overrides(parser, "such as train.epochs=10")


def add_overrides(parser: Parser, example: str) -> None:
    """Settings on the command line."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=example)
