"""Add a label set to a data set: a noise model's labels, those of a file, or labels put right. No image is changed.

nldist noise DATASET --model symmetric --rate 0.5 --seed 1 --name sym50
nldist noise DATASET --model semantic --run runs/weak --name semantic
nldist noise DATASET --csv cifar10n_labels.csv --label-column worst --name worst
nldist noise DATASET --human CIFAR-10_human.pt --name worst
nldist noise DATASET --from-run runs/mine --below 0.3 --marks marks.csv --name corrected --export corrected.csv
nldist noise DATASET --name corrected --export corrected.csv   (a label set that is there)
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from nldist.cli.options import Parser
from nldist.data.corrections import apply_marks, corrected, export
from nldist.data.human import human_labels
from nldist.data.index import Index
from nldist.data.labels import (
    CLEAN,
    NOISE_MODELS,
    label_set_path,
    labels_from_csv,
    transition_table,
    write_label_set,
)
from nldist.data.make.meaning import READINGS, shown
from nldist.data.samples import Samples
from nldist.dist.environment import Place
from nldist.errors import UserError, main_guard

SEMANTIC = "semantic"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(prog="nldist noise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="directory of a sharded data set")
    parser.add_argument("--name", required=True, help="of the new label set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--labels-dir", type=Path, help="where label sets go, if not into DATASET (data.labels_dir)")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--model", help=f"noise model: {', '.join([*NOISE_MODELS, SEMANTIC])}")
    origin.add_argument("--csv", help="table with a header, a path and a label (class name or id) per row")
    origin.add_argument("--human", type=Path, metavar="FILE", help="CIFAR-10N's or CIFAR-100N's .pt or .npy file")
    origin.add_argument("--from-run", type=Path, metavar="RUN", help="its labels, put right where it doubts them")
    parser.add_argument(
        "--below", type=float, help="with --from-run: replace labels less probable than this (default 0.5)"
    )
    parser.add_argument(
        "--at-most-rate", type=float, help="with --from-run: share of the labels that is replaced at most"
    )
    parser.add_argument(
        "--marks", type=Path, help="table of key, given, suggested, mark (wrong, right, unsure): wins over the run"
    )
    parser.add_argument(
        "--export", type=Path, metavar="FILE", help="also write the label set as a table of path and label"
    )
    parser.add_argument("--rate", type=float, help="with --model: share of the samples to select, in [0, 1]")
    parser.add_argument("--run", type=Path, help="with --model semantic: run directory of the classifier")
    parser.add_argument("--weights", choices=("last", "best"), default="last", help="with --run (default last)")
    parser.add_argument("--seed", type=int, default=0, help="with --model (default 0)")
    parser.add_argument("--path-column", default="path", help="with --csv (default: path)")
    parser.add_argument(
        "--label-column", help="with --csv (default: label), or --human (default: what --name says, such as worst)"
    )
    parser.add_argument("--labels", choices=READINGS, help="with --csv: what numbers are, where they could be both")
    return parser.parse_args(argv)


def from_model(index: Index, args: argparse.Namespace) -> np.ndarray:
    """Labels that a noise model makes from the clean ones, or from the given ones where none are known."""
    if args.name == CLEAN:
        raise UserError(f"the label set {CLEAN!r} holds the true labels: choose another name")
    if args.model == SEMANTIC:
        return semantic(index, args)
    if args.model not in NOISE_MODELS:
        raise UserError(f"unknown noise model {args.model!r}; there are {', '.join([*NOISE_MODELS, SEMANTIC])}")
    if args.run is not None:
        raise UserError(f"--run is for --model {SEMANTIC}, not for {args.model}")
    if args.rate is None or not 0 <= args.rate <= 1:
        raise UserError(f"--model needs a --rate in [0, 1], not {args.rate}")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, not {args.seed}")
    clean = index.labels(CLEAN if CLEAN in index.label_sets() else None)
    return NOISE_MODELS[args.model](clean, index.classes, args.rate, args.seed)


def semantic(index: Index, args: argparse.Namespace) -> np.ndarray:
    """Labels that a weak trained classifier predicts: wrong where images mislead (ScanMix, table 2)."""
    if args.run is None or args.rate is not None:
        raise UserError(
            f"--model {SEMANTIC} takes its labels, and so its rate, from a trained --run RUN; give no --rate"
        )
    from nldist.train.evaluate import labels_of

    return labels_of(args.run, args.weights, index.root, index.split)


def from_csv(index: Index, args: argparse.Namespace) -> np.ndarray:
    """Labels that a table gives."""
    column = args.label_column or "label"
    labels, num_ignored = labels_from_csv(index, args.csv, args.path_column, column, args.labels)
    if num_ignored:
        print(f"{num_ignored} rows of {args.csv} are about images that the data set does not have: ignored")
    return labels


def from_run(index: Index, args: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """A run's labels put right, and what a person has marked; and where they are from."""
    if args.from_run is None:
        labels, origin = index.labels().copy(), {}
    else:
        below = 0.5 if args.below is None else args.below
        said = Samples.read(args.from_run, index)
        labels = corrected(said, below, args.at_most_rate)
        origin = {"from_run": str(args.from_run.absolute()), "below": below, "at_most_rate": args.at_most_rate}
        origin |= {"label_set": said.label_set, "num_epochs": said.num_epochs, "of_epochs": said.of_epochs}
        num_replaced = np.count_nonzero(labels != said.given)
        print(f"{num_replaced} of {len(labels)} labels replaced by what {args.from_run} suggests {said.when}")
    if args.marks is not None:
        before = labels.copy()
        counts = apply_marks(index, labels, args.marks, args.labels)
        origin["marks"] = {"file": str(args.marks.absolute()), **counts}
        told = ", ".join(f"{count} {mark}" for mark, count in counts.items())
        print(f"{args.marks}: {told}; {np.count_nonzero(labels != before)} labels are others by it")
    return labels, origin


def check(args: argparse.Namespace) -> None:
    """Refuse (UserError) options that do not belong together."""
    for name in ("below", "at_most_rate"):
        value = getattr(args, name)
        if value is not None and not (args.from_run and 0 <= value <= 1):
            raise UserError(f"--{name.replace('_', '-')} is a number in [0, 1] for --from-run, not {value}")
    if args.marks is not None and (args.model or args.csv or args.human):
        raise UserError("--marks is for --from-run, or stands alone: its marks are about labels that were given")
    if args.rate is not None and not args.model:
        raise UserError("--rate is for --model; with --from-run say --at-most-rate")
    if args.name == CLEAN and args.from_run:
        raise UserError(
            f"the label set {CLEAN!r} holds the true labels, not those that a run suggests: choose another name"
        )


def record_clean(index: Index, root: Path) -> None:
    """Make the given labels the label set `clean` unless there is one."""
    if CLEAN not in index.label_sets():
        write_label_set(root, index.split, CLEAN, index.labels())
        print(f"the given labels were taken as the true ones and are now the label set {CLEAN!r}")


def report(index: Index, name: str, labels: np.ndarray) -> None:
    """Print how the labels differ from the clean ones; from the given ones where no clean ones are known."""
    if name == CLEAN:
        what, reference, noisy = ("given labels", "these"), labels, index.labels()
    elif CLEAN in index.label_sets():
        what, reference, noisy = ("labels", "the clean ones"), index.labels(CLEAN), labels
    else:
        what, reference, noisy = ("labels", "the given ones"), index.labels(), labels
    num_changed = int(np.count_nonzero(reference != noisy))
    share = 100 * num_changed / max(len(labels), 1)
    print(f"{name}: {num_changed} of {len(labels)} {what[0]} ({share:.2f} %) differ from {what[1]}")
    counts = np.bincount(labels, minlength=index.num_classes)
    if empty := [name for name, count in zip(index.classes, counts, strict=True) if count == 0]:
        print(f"{len(empty)} of {index.num_classes} classes have no label: {shown(empty)}")
    print(transition_table(reference, noisy, index.classes))


@main_guard
def main(argv: list[str] | None = None) -> None:
    """Make the labels, write them and say what they are like."""
    args = parse(argv)
    label_set_path(args.dataset, args.split, args.name)
    # Where the data set cannot be written, nor can the file of its columns.
    index = Index.open(args.dataset, args.split, args.labels_dir, args.labels_dir)
    root = args.labels_dir or index.root
    check(args)
    if not (args.model or args.csv or args.human or args.from_run or args.marks):
        if args.export is None:
            raise UserError(
                "give --model, --csv, --human, --from-run, --marks, or --export for a label set that is there"
            )
        write_export(index, index.labels(args.name), args.export)
        return
    origin: dict[str, Any] = {}
    if args.model:
        labels = from_model(index, args)
    elif args.csv:
        labels = from_csv(index, args)
    elif args.human:
        labels = human_labels(index, args.human, args.label_column or args.name)
    else:
        labels, origin = from_run(index, args)
    if Place.find().rank:
        return
    if args.labels_dir and label_set_path(index.root, args.split, args.name).exists():
        raise UserError(f"{args.dataset} has a label set {args.name!r} of its own: choose another name")
    path = write_label_set(root, args.split, args.name, labels, origin)
    if args.model or args.human:
        record_clean(index, root)
    report(index, args.name, labels)
    print(f"written to {path}")
    if args.export is not None:
        write_export(index, labels, args.export)


def write_export(index: Index, labels: np.ndarray, file: Path) -> None:
    """Write labels as a table."""
    try:
        export(index, labels, file)
    except OSError as error:
        raise UserError(f"--export {file} cannot be written: {error.strerror}") from None
    print(f"exported to {file}")
