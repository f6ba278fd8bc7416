import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nldist.cli.noise import main
from nldist.data.index import Index
from nldist.data.labels import (
    asymmetric,
    labels_from_csv,
    pairflip,
    symmetric,
    transition_table,
    write_label_set,
)
from nldist.errors import UserError
from tests.data.make import make_dataset, write_facts, write_index

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10N = Path(__file__).parents[3] / "shared" / "data" / "cifar10" / "cifar10n_labels.csv"


def clean_labels(num_samples: int, num_classes: int) -> np.ndarray:
    return np.random.default_rng(9).integers(num_classes, size=num_samples, dtype=np.int32)


def class_names(num_classes: int) -> list[str]:
    return [f"class {c}" for c in range(num_classes)]


def set_classes(root: Path, classes: list[str]) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": classes}))


def keyed_dataset(root: Path, keys: list[str], labels: np.ndarray, classes: list[str]) -> Index:
    """A data set of which only the index exists: label tools do not look at images."""
    (root / "train").mkdir(parents=True)
    zeros = np.zeros(len(keys), np.int64)
    columns = dict.fromkeys(["shard", "offset", "size", "crc32", "height", "width"], zeros)
    write_index(root / "train" / "index.parquet", columns | {"key": keys}, labels)
    facts = {"path": "train/train-000000.tar", "num_samples": len(keys), "num_bytes": 0, "sha256": ""}
    write_facts(root, "train", [facts], len(classes))
    set_classes(root, classes)
    return Index.open(root, "train")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", [15, 5], num_classes=4)


# ---- noise models


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_symmetric_noise_may_keep_the_true_class(num_classes: int, rate: float) -> None:
    clean = clean_labels(50_000, num_classes)
    noisy = symmetric(clean, class_names(num_classes), rate, seed=1)
    assert noisy.dtype == np.int32
    expected = rate * (num_classes - 1) / num_classes
    assert np.mean(noisy != clean) == pytest.approx(expected, abs=0.01)
    counts = np.bincount(noisy[noisy != clean], minlength=num_classes)
    assert np.all(np.abs(counts - counts.mean()) <= 5 * np.sqrt(counts.mean()))


@pytest.mark.parametrize("model", [symmetric, pairflip])
def test_noise_of_one_seed_is_nested(model: object) -> None:
    clean, classes = clean_labels(5_000, 10), class_names(10)
    assert callable(model)
    low, high = (model(clean, classes, rate, 3) for rate in (0.3, 0.7))
    changed = low != clean
    np.testing.assert_array_equal(low[changed], high[changed])
    assert np.count_nonzero(high != clean) > np.count_nonzero(changed)
    np.testing.assert_array_equal(model(clean, classes, 0.3, 3), low)
    assert np.any(model(clean, classes, 0.3, 4) != low)


def test_the_number_of_selected_samples_is_exact() -> None:
    clean = clean_labels(12_345, 7)
    assert np.count_nonzero(pairflip(clean, class_names(7), 0.37, 0) != clean) == int(0.37 * 12_345)
    np.testing.assert_array_equal(pairflip(clean, class_names(7), 1, 0), (clean + 1) % 7)


def test_asymmetric_noise_of_cifar10_goes_by_class_name() -> None:
    classes = CIFAR10[::-1]
    clean = clean_labels(50_000, 10)
    noisy = asymmetric(clean, classes, 0.4, seed=1)
    pairs = {(classes[a], classes[b]) for a, b in zip(clean, noisy, strict=True) if a != b}
    assert pairs == {
        ("truck", "automobile"),
        ("bird", "airplane"),
        ("deer", "horse"),
        ("cat", "dog"),
        ("dog", "cat"),
    }
    assert np.mean(noisy != clean) == pytest.approx(0.2, abs=0.01)
    assert np.mean((noisy != clean)[clean == classes.index("cat")]) == pytest.approx(0.4, abs=0.02)


def test_asymmetric_noise_of_cifar100_stays_in_groups_of_five() -> None:
    clean = np.arange(100, dtype=np.int32)
    noisy = asymmetric(clean, class_names(100), 1.0, seed=0)
    np.testing.assert_array_equal(noisy[:10], [1, 2, 3, 4, 0, 6, 7, 8, 9, 5])
    np.testing.assert_array_equal(noisy // 5, clean // 5)
    assert sorted(noisy) == list(range(100))


def test_asymmetric_noise_needs_a_class_map() -> None:
    with pytest.raises(UserError, match=r"CIFAR-10 .* CIFAR-100"):
        asymmetric(clean_labels(10, 10), class_names(10), 0.4, 0)


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan")])
def test_noise_rate_out_of_range(rate: float) -> None:
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        symmetric(clean_labels(10, 4), class_names(4), rate, 0)


# ---- label sets


def test_a_written_label_set_is_read_by_the_index(dataset: Path) -> None:
    labels = clean_labels(20, 4)
    path = write_label_set(dataset, "train", "mine", labels)
    index = Index.open(dataset, "train")
    np.testing.assert_array_equal(index.labels("mine"), labels)
    assert pq.read_schema(path).types == ["int64", "int32"]
    assert [p.name for p in path.parent.iterdir()] == ["mine.parquet"]


def test_a_label_set_is_not_overwritten(dataset: Path) -> None:
    labels = clean_labels(20, 4)
    path = write_label_set(dataset, "train", "mine", labels)
    before = path.read_bytes()
    assert write_label_set(dataset, "train", "mine", labels.astype(np.int64)) == path
    with pytest.raises(UserError, match="choose another name"):
        write_label_set(dataset, "train", "mine", (labels + 1) % 4)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["", ".hidden", "../x", "a/b", "a b", "x\0"])
def test_label_set_names_that_are_no_file_names(dataset: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a label set"):
        write_label_set(dataset, "train", name, np.zeros(20, np.int32))
    assert not (dataset / "train" / "labels").exists()


def test_transition_table_in_per_cent_of_the_clean_class() -> None:
    clean, noisy = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 0])
    lines = transition_table(clean, noisy, ["cat", "dog", "none"]).splitlines()
    cells = [line.split() for line in lines]
    assert cells == [
        ["cat", "dog", "none"],
        ["cat", "75.0", "25.0", "0.0"],
        ["dog", "50.0", "50.0", "0.0"],
        ["none", "0.0", "0.0", "0.0"],
    ]


def test_transition_table_of_many_classes_is_a_summary() -> None:
    clean = np.repeat(np.arange(50), 10)
    noisy = clean.copy()
    noisy[:4] = 7  # class 0
    noisy[10] = 2  # class 1
    text = transition_table(clean, noisy, class_names(50))
    lines = text.splitlines()
    assert lines[1].strip() == "class 0 -> class 7: 4, 40.0 %"
    assert lines[2].strip() == "class 1 -> class 2: 1, 10.0 %"
    assert lines[3] == "noise rate of a class: min 0.0 %, median 0.0 %, max 40.0 %"


# ---- labels from a table

KEYS = ["cat/1_a", "dog/1", "dog/2"]
ROWS = ["data/train/cat/1.a.jpg,dog", "data/train/dog/1.png,dog", "data/train/dog/2.jpg,cat"]


def animals(root: Path) -> Index:
    return keyed_dataset(root, KEYS, np.array([0, 1, 1]), ["cat", "dog"])


def table(path: Path, rows: list[str], header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize("prefix", ["", "./", "/", "x/", "a.b/c/d/"])
def test_csv_rows_match_whatever_directories_lead(tmp_path: Path, prefix: str) -> None:
    rows = [prefix + row.removeprefix("data/train/") for row in [*ROWS[::-1], "data/train/dog/3.jpg,cat"]]
    file = table(tmp_path / "l.csv", rows)
    labels, num_ignored = labels_from_csv(animals(tmp_path / "set"), file, "path", "label")
    np.testing.assert_array_equal(labels, [1, 1, 0])
    assert num_ignored == 1


def test_csv_labels_may_be_integers_in_another_column(tmp_path: Path) -> None:
    rows = ["cat/1_a.jpg,1,x", "dog/1.jpg,1,y", "dog/2.jpg,0,z"]
    file = table(tmp_path / "l.csv", rows, "file,human,comment")
    labels, num_ignored = labels_from_csv(animals(tmp_path / "set"), file, "file", "human")
    np.testing.assert_array_equal(labels, [1, 1, 0])
    assert num_ignored == 0


def test_csv_directories_are_left_out_alike_in_all_rows(tmp_path: Path) -> None:
    file = table(tmp_path / "l.csv", [*ROWS[:2], "dog/2.jpg,cat"])
    with pytest.raises(UserError, match=r"no row for 1 of 3 samples, such as 'dog/2'"):
        labels_from_csv(animals(tmp_path / "set"), file, "path", "label")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:2], "no row for 1 of 3 samples, such as 'dog/2'"),
        (["other.jpg,cat"], "no row for 3 of 3 samples, such as 'cat/1_a', 'dog/1', 'dog/2'; .*'other'"),
        ([*ROWS, "data/train/dog/2.png,dog"], "two rows for 'data/train/dog/2' disagree"),
        ([*ROWS[:2], "data/train/dog/2.jpg,wolf"], "wolf"),
        ([*ROWS[:2], "data/train/dog/2.jpg,"], "empty label"),
    ],
)
def test_csv_faults_are_named(tmp_path: Path, rows: list[str], message: str) -> None:
    file = table(tmp_path / "l.csv", rows)
    with pytest.raises(UserError, match=message):
        labels_from_csv(animals(tmp_path / "set"), file, "path", "label")


def test_two_rows_that_agree_are_one(tmp_path: Path) -> None:
    file = table(tmp_path / "l.csv", [*ROWS, ROWS[0]])
    labels, _ = labels_from_csv(animals(tmp_path / "set"), file, "path", "label")
    np.testing.assert_array_equal(labels, [1, 1, 0])


# ---- the command line


def run(*argv: object) -> int:
    return main([str(argument) for argument in argv])


def test_noise_command_records_clean_labels_first(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dataset, "--model", "pairflip", "--rate", 0.5, "--seed", 2, "--name", "pair50") == 0
    index = Index.open(dataset, "train")
    assert index.label_sets() == ["clean", "pair50"]
    np.testing.assert_array_equal(index.labels("clean"), index.labels())
    given = pairflip(index.labels(), index.classes, 0.5, 2)
    np.testing.assert_array_equal(index.labels("pair50"), given)
    assert "10 of 20 labels (50.00 %) differ from the clean ones" in capsys.readouterr().out


def test_noise_command_starts_from_the_clean_label_set(dataset: Path) -> None:
    write_label_set(dataset, "train", "clean", np.zeros(20, np.int32))
    assert run(dataset, "--model", "pairflip", "--rate", 1, "--name", "all") == 0
    np.testing.assert_array_equal(Index.open(dataset, "train").labels("all"), np.ones(20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "symmetric", "--rate", "1.5", "--name", "x"], "--rate in [0, 1], not 1.5"),
        (["--model", "symmetric", "--name", "x"], "--rate in [0, 1], not None"),
        (["--model", "gaussian", "--rate", "0.5", "--name", "x"], "unknown noise model 'gaussian'"),
        (["--model", "semantic", "--rate", "0.5", "--name", "x"], "from a trained --run RUN; give no --rate"),
        (["--model", "semantic", "--run", "absent", "--name", "x"], "absent is not a run directory"),
        (["--model", "symmetric", "--run", "absent", "--rate", "0.5", "--name", "x"], "--run is for --model semantic"),
        (["--model", "asymmetric", "--rate", "0.5", "--name", "x"], "not for these 4 classes"),
        (["--model", "symmetric", "--rate", "0.5", "--name", "a/b"], "cannot name a label set"),
        (["--model", "symmetric", "--rate", "0.5", "--name", "clean"], "choose another name"),
        (["--model", "symmetric", "--rate", "0.5", "--name", "x", "--seed", "-1"], "--seed must not"),
        (["--model", "symmetric", "--rate", "0.5", "--name", "taken"], "choose another name"),
        (["--model", "symmetric", "--rate", "0.5", "--name", "x", "--split", "dev"], "no split 'dev'"),
        (["--csv", "absent.csv", "--name", "x"], "absent.csv"),
    ],
)
def test_noise_command_refuses_in_one_line(
    dataset: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_label_set(dataset, "train", "taken", np.zeros(20, np.int32))
    assert run(dataset, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert Index.open(dataset, "train").label_sets() == ["taken"]


def test_noise_command_names_a_missing_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    animals(tmp_path / "set")
    file = table(tmp_path / "l.csv", ROWS)
    assert run(tmp_path / "set", "--csv", file, "--label-column", "human", "--name", "x") == 2
    error = capsys.readouterr().err
    assert "human" in error
    assert error.count("\n") == 1


def test_noise_command_takes_clean_labels_from_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = animals(tmp_path / "set")
    file = table(tmp_path / "l.csv", ROWS)
    assert run(tmp_path / "set", "--csv", file, "--name", "clean") == 0
    np.testing.assert_array_equal(index.labels("clean"), [1, 1, 0])
    assert "clean: 2 of 3 given labels (66.67 %) differ from these" in capsys.readouterr().out


@pytest.mark.skipif(not CIFAR10N.exists(), reason=f"CIFAR-10N's labels are not at {CIFAR10N}")
def test_human_labels_of_cifar10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [line.split(",") for line in CIFAR10N.read_text().splitlines()[1:5001:5]]
    keys = [path.removesuffix(".jpg") for path, *_ in wanted]
    given = np.array([CIFAR10.index(clean) for _, clean, *_ in wanted])
    index = keyed_dataset(tmp_path / "set", keys, given, CIFAR10)
    for column in ("clean", "worst"):
        assert run(tmp_path / "set", "--csv", CIFAR10N, "--label-column", column, "--name", column) == 0
    np.testing.assert_array_equal(index.labels("clean"), given)
    assert [index.classes[y] for y in index.labels("worst")] == [row[4] for row in wanted]
    assert 0.35 < np.mean(index.labels("worst") != given) < 0.45
    output = capsys.readouterr().out
    assert "49000 rows" in output
    assert "differ from the clean ones" in output
