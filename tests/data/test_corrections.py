"""Labels put right by a run and by a person, through the real command."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nldist.cli.noise import main
from nldist.data.corrections import apply_marks
from nldist.data.index import Index
from nldist.data.samples import Samples
from nldist.errors import UserError
from tests.conftest import run_tool


def write_run(run_dir: Path, index: Index, given: np.ndarray, probability: np.ndarray, suggested: np.ndarray) -> None:
    """A run that has not ended: probabilities alone decide."""
    (run_dir / "tables").mkdir(parents=True)
    Samples(given, probability, suggested, np.full(len(index), np.nan), "sym50", 2, 3).write(run_dir, index)


@pytest.fixture
def run(digits: Path, tmp_path: Path) -> Path:
    """What a run on sym50 says that knows the truth, but for ids 0 to 9 (nothing) and 10 to 19 (sure of the labels)."""
    index = Index.open(digits, "train")
    given, clean = index.labels("sym50"), index.labels("clean")
    probability = np.where(given == clean, 0.9, np.linspace(0, 0.4, len(given))).astype(np.float32)
    probability[:10], probability[10:20] = np.nan, 0.99
    suggested = np.where(np.arange(len(given)) < 10, -1, clean)
    write_run(tmp_path / "run", index, given, probability, suggested)
    return tmp_path / "run"


def labels(digits: Path, name: str, labels_dir: Path) -> np.ndarray:
    return Index.open(digits, "train", None, labels_dir).labels(name)


def noise(digits: Path, tmp_path: Path, *arguments: object) -> int:
    return main([str(digits), "--labels-dir", str(tmp_path / "labels"), *map(str, arguments)])


def test_a_runs_labels_put_right(digits: Path, run: Path, tmp_path: Path) -> None:
    index = Index.open(digits, "train")
    given, clean = index.labels("sym50"), index.labels("clean")
    wrong = np.flatnonzero((given != clean) & (np.arange(len(given)) >= 20))

    assert noise(digits, tmp_path, "--from-run", run, "--name", "all") == 0
    wanted = given.copy()
    wanted[wrong] = clean[wrong]
    np.testing.assert_array_equal(labels(digits, "all", tmp_path / "labels"), wanted)

    assert noise(digits, tmp_path, "--from-run", run, "--below", 0.1, "--name", "sure") == 0
    sure = wrong[np.linspace(0, 0.4, len(given)).astype(np.float32)[wrong] < 0.1]
    wanted = given.copy()
    wanted[sure] = clean[sure]
    np.testing.assert_array_equal(labels(digits, "sure", tmp_path / "labels"), wanted)

    rate = 50.5 / len(given)
    assert noise(digits, tmp_path, "--from-run", run, "--at-most-rate", rate, "--name", "few") == 0
    wanted = given.copy()
    wanted[wrong[:50]] = clean[wrong[:50]]  # the least probable ones
    np.testing.assert_array_equal(labels(digits, "few", tmp_path / "labels"), wanted)
    file = tmp_path / "labels" / "train" / "labels" / "few.parquet"
    origin = json.loads(pq.read_schema(file).metadata[b"nldist"])
    said = {"label_set": "sym50", "num_epochs": 2, "of_epochs": 3}
    assert origin == {"from_run": str(run), "below": 0.5, "at_most_rate": rate, **said}


def write_marks(file: Path, rows: Sequence[tuple[str, ...]], delimiter: str = ",") -> Path:
    with file.open("w", newline="", encoding="utf-8-sig") as out:
        csv.writer(out, delimiter=delimiter).writerows([("key", "given", "suggested", "mark"), *rows])
    return file


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_what_a_person_marked_wins(delimiter: str, digits: Path, run: Path, tmp_path: Path) -> None:
    index = Index.open(digits, "train")
    given, clean, keys = index.labels("sym50"), index.labels("clean"), index.keys(range(len(index)))
    wrong = np.flatnonzero((given != clean) & (np.arange(len(given)) >= 20))
    first, second = int(wrong[0]), int(wrong[1])
    names = index.classes
    rows = [
        (keys[first], names[given[first]], names[clean[first]], "right"),
        (keys[second], names[given[second]], names[clean[second]], "unsure"),
        (keys[12], names[given[12]], names[(given[12] + 3) % 10], "wrong"),
        (keys[13], names[given[13]], "no such class", ""),
    ]
    marks = write_marks(tmp_path / "marks.csv", rows, delimiter)
    assert noise(digits, tmp_path, "--from-run", run, "--marks", marks, "--name", "marked") == 0
    wanted = given.copy()
    wanted[wrong] = clean[wrong]
    wanted[first], wanted[12] = given[first], (given[12] + 3) % 10
    np.testing.assert_array_equal(labels(digits, "marked", tmp_path / "labels"), wanted)

    assert noise(digits, tmp_path, "--marks", marks, "--name", "by-hand") == 0
    wanted = index.labels().copy()
    wanted[first], wanted[12] = given[first], (given[12] + 3) % 10
    np.testing.assert_array_equal(labels(digits, "by-hand", tmp_path / "labels"), wanted)


@pytest.mark.parametrize("suggested", ["GIVEN", ""])
def test_wrong_without_another_class_changes_nothing_and_is_told(
    suggested: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Index.open(digits, "train")
    given = index.classes[index.label[5]]
    rows = [
        (index.keys([5])[0], given, suggested.replace("GIVEN", given), "wrong"),
        (index.keys([6])[0], index.classes[index.label[6]], index.classes[(index.label[6] + 1) % 10], "wrong"),
    ]
    marks = write_marks(tmp_path / "marks.csv", rows)
    assert noise(digits, tmp_path, "--marks", marks, "--name", "marked") == 0
    assert "1 wrong, 0 right, 0 unsure, 1 wrong without another class; 1 labels are others" in capsys.readouterr().out
    changed = np.flatnonzero(labels(digits, "marked", tmp_path / "labels") != index.label)
    assert changed.tolist() == [6]


def test_an_exported_label_set_can_be_brought_back(digits: Path, run: Path, tmp_path: Path) -> None:
    table = tmp_path / "corrected.csv"
    assert noise(digits, tmp_path, "--from-run", run, "--name", "corrected", "--export", table) == 0
    assert noise(digits, tmp_path, "--csv", table, "--name", "back") == 0
    wanted = labels(digits, "corrected", tmp_path / "labels")
    np.testing.assert_array_equal(labels(digits, "back", tmp_path / "labels"), wanted)
    before = table.read_bytes()
    assert noise(digits, tmp_path, "--name", "corrected", "--export", table) == 0
    assert table.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--name=x"), "--export for a label set that is there"),
        (("--name=x --below=0.3 --export=x.csv"), "--below is a number in [0, 1] for --from-run"),
        (("--name=clean --from-run=RUN"), "holds the true labels"),
        (("--name=x --from-run=RUN --rate=0.1"), "say --at-most-rate"),
        (("--name=x --from-run=RUN --export=MARKS"), "holds something else"),
        (("--name=x --model=symmetric --rate=0.1 --marks=MARKS"), "--marks is for --from-run"),
        (("--name=x --from-run=RUN --below=1.5"), "--below is a number in [0, 1]"),
        (("--name=x --marks=MARKS --at-most-rate=0.1"), "--at-most-rate is a number in [0, 1] for --from-run"),
        (("--name=x --from-run=nowhere"), "the run says nothing about labels yet"),
        (("--name=x --from-run=RUN --marks=nowhere.csv"), "nowhere.csv cannot be read"),
        (("--name=x --from-run=RUN --marks=MARKS"), "mark 'maybe' is none of wrong, right, unsure"),
    ],
)
def test_one_clear_line(
    arguments: str, words: str, digits: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = write_marks(tmp_path / "marks.csv", [("0", "0", "1", "maybe")])
    given = arguments.replace("RUN", str(run)).replace("MARKS", str(marks)).split()
    assert noise(digits, tmp_path, *given) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert words in told


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("no such key", "0", "1", "wrong")], "no sample 'no such key'"),
        ([("KEY", "0", "eleven", "wrong")], "suggested"),
        ([("KEY", "0", "1", "wrong"), ("./KEY", "0", "1", "right")], "has two marks"),
        ([("KEY", "0", "1", "wrong", "more")], "line 2 has more or fewer cells"),
        ([("KEY", "0")], "line 2 has more or fewer cells"),
    ],
)
def test_marks_that_mean_nothing(
    rows: list[tuple[str, ...]],
    words: str,
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = Index.open(digits, "train").keys([5])[0]
    marks = write_marks(tmp_path / "marks.csv", [(row[0].replace("KEY", key), *row[1:]) for row in rows])
    assert noise(digits, tmp_path, "--marks", marks, "--name", "x") == 2
    assert words in capsys.readouterr().err


def test_marks_of_classes_whose_names_are_numbers_have_one_reading(tmp_path: Path) -> None:
    """10 can only be a name, 0 only an index: the table is refused, also where they are in two columns."""
    for number in range(1, 11):
        folder = tmp_path / "photos" / str(number)
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / f"{number}.png")
    run_tool("tools/shard.py", "folder", tmp_path / "photos", tmp_path / "data", "--split", "train")
    index = Index.open(tmp_path / "data", "train")
    marks = write_marks(tmp_path / "marks.csv", [(index.keys([0])[0], "10", "0", "wrong")])
    with pytest.raises(UserError, match="10"):
        apply_marks(index, index.labels().copy(), marks)


def test_a_line_break_in_a_key_is_part_of_it(digits: Path, tmp_path: Path) -> None:
    marks = write_marks(tmp_path / "marks.csv", [("a\x85b\r\nc", "0", "1", "right")])
    index = Index.open(digits, "train")
    with pytest.raises(UserError) as told:
        apply_marks(index, index.labels().copy(), marks)
    assert repr("a\x85b\r\nc") in str(told.value)


def test_a_run_with_other_classes_is_refused(digits: Path, run: Path) -> None:
    index = Index.open(digits, "train")
    index.classes = index.classes[::-1]
    with pytest.raises(UserError, match="other classes"):
        Samples.read(run, index)


def test_a_run_on_other_samples_is_refused(digits: Path, run: Path) -> None:
    with pytest.raises(UserError, match="other samples"):
        Samples.read(run, Index.open(digits, "test"))
