"""What the audit says of labels, against plain counting; duplicates against pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from nldist.data.index import Index
from nldist.data.reader import Reader
from nldist.data.samples import Samples
from nldist.report.audit import Audit
from nldist.report.duplicates import exact, near
from tests.data.make import make_dataset

N, C = 60, 7


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index.open(make_dataset(tmp_path / "data", [25, 35]), "train")


@pytest.fixture
def samples(index: Index) -> Samples:
    """Many equal probabilities, as a mixture gives; 3 samples were never seen."""
    rng = np.random.default_rng(0)
    probability = rng.choice([0, 0.05, 0.3, 0.7, 1], N).astype(np.float32)
    suggested, margin = rng.integers(0, C, N), rng.normal(size=N).astype(np.float32)
    probability[[7, 20, 41]], margin[[7, 20, 41]], suggested[[7, 20, 41]] = np.nan, np.nan, -1
    return Samples(index.label, probability, suggested, margin, None, 4, 4)


SEEN = [id_ for id_ in range(N) if id_ not in (7, 20, 41)]


def test_the_order_is_by_the_margin_less_half_its_class_s_mean(samples: Samples) -> None:
    """Of a class with few labels the mean is mostly that of all."""
    overall = np.mean([samples.margin[id_] for id_ in SEEN])

    def relative(id_: int) -> float:
        own = [float(samples.margin[other]) for other in SEEN if samples.given[other] == samples.given[id_]]
        return float(samples.margin[id_] - (sum(own) + 20 * overall) / (len(own) + 20) / 2)

    assert samples.order().tolist() == sorted(SEEN, key=relative)


def test_before_the_end_the_order_is_by_probability(samples: Samples) -> None:
    nothing = np.full(N, np.nan, np.float32)
    going_on = replace(samples, margin=nothing)
    assert going_on.order().tolist() == sorted(SEEN, key=lambda id_: float(samples.clean_probability[id_]))


def test_an_image_that_could_not_be_read_at_the_end_is_not_judged(samples: Samples, index: Index) -> None:
    """PENCIL has a probability for it all the same."""
    samples.margin[SEEN[0]] = np.nan
    assert sorted(samples.order().tolist()) == SEEN[1:]
    assert SEEN[0] in Audit(samples, index).unseen


def test_counts_are_those_of_plain_counting(samples: Samples, index: Index) -> None:
    audit = Audit(samples, index)
    assert audit.unseen.tolist() == [7, 20, 41]
    by_class, given, p = audit.by_class(), samples.given, samples.clean_probability
    for number in range(C):
        own = [p[id_] for id_ in range(N) if given[id_] == number and not np.isnan(p[id_])]
        count = by_class[number]
        assert count.labels == len(own)
        assert count.expected == pytest.approx(sum(1 - value for value in own))
        assert (count.least, count.most) == (sum(v < 0.1 for v in own), sum(v < 0.9 for v in own))
    assert audit.total().labels == N - 3
    wrong = {id_ for id_ in range(N) if p[id_] < 0.5 and samples.suggested[id_] != given[id_]}
    assert set(np.flatnonzero(audit.wrong)) == wrong
    pairs = audit.pairs()
    assert [pair.count for pair in pairs] == sorted((pair.count for pair in pairs), reverse=True)
    counted = {(int(given[id_]), int(samples.suggested[id_])) for id_ in wrong}
    assert {(pair.given, pair.suggested) for pair in pairs} == counted
    assert sum(pair.count for pair in pairs) == len(wrong)


@pytest.mark.parametrize("num_images", [1, 8, 20, 57, 500])
def test_the_chosen_are_the_most_doubtful_and_some_of_each_pair(
    num_images: int, samples: Samples, index: Index
) -> None:
    audit = Audit(samples, index)
    pairs = audit.pairs()
    chosen = audit.chosen(pairs, num_images, 2)
    assert len(chosen) == len(set(chosen.tolist())) == min(num_images, N - 3)
    assert np.array_equal(audit.rank[chosen], np.sort(audit.rank[chosen]))
    for pair in pairs[: num_images // 4]:
        own = [
            id_
            for id_ in audit.order.tolist()
            if audit.wrong[id_] and (samples.given[id_], samples.suggested[id_]) == (pair.given, pair.suggested)
        ]
        assert set(own[:2]) <= set(chosen)
    if num_images >= 4:
        assert set(audit.order[: num_images // 2]) <= set(chosen)


def test_tables_hold_every_sample_the_most_doubtful_first(samples: Samples, index: Index, tmp_path: Path) -> None:
    audit = Audit(samples, index)
    audit.write_tables(tmp_path)
    table = pq.read_table(tmp_path / "labels.parquet").to_pydict()
    ids = [*audit.order.tolist(), 7, 20, 41]
    assert table["key"] == index.keys(ids)
    assert table["rank"] == [*range(1, N - 2), None, None, None]
    assert table["given"] == [index.classes[samples.given[id_]] for id_ in ids]
    assert table["suggested"][:3] == [index.classes[samples.suggested[id_]] for id_ in ids[:3]]
    assert table["suggested"][-1] is table["p_clean"][-1] is table["margin"][-1] is None
    assert table["path"] == [f"train/train-{0 if id_ < 25 else 1:06d}.tar" for id_ in ids]
    text = pyarrow.csv.read_csv(tmp_path / "labels.csv").to_pydict()
    assert text["key"] == table["key"]
    assert text["margin"][:5] == pytest.approx(table["margin"][:5])


def test_secrets_of_a_shard_s_url_are_in_no_table(samples: Samples, index: Index) -> None:
    index.shards = ["https://me:secret@store.example:9000/b/train-0.tar?X-Signature=secret", "/elsewhere/train-1.tar"]
    paths = set(Audit(samples, index).table(np.arange(N), index.key_column())["path"].to_pylist())
    assert paths == {"https://store.example:9000/b/train-0.tar", "/elsewhere/train-1.tar"}


def test_no_label_is_known_before_the_first_opinion(index: Index) -> None:
    nothing = np.full(N, np.nan, np.float32)
    audit = Audit(Samples(index.label, nothing, np.full(N, -1), nothing, None, 1, 4), index)
    assert audit.total().labels == audit.total().expected == 0
    assert audit.pairs() == []
    assert len(audit.chosen([], 10, 5)) == 0


def patterns(id_: int) -> np.ndarray:
    """Ids 0 to 3: one picture, 0 and 1 byte for byte, 2 slightly darker, 3 turned around; the others are others."""
    picture = np.random.default_rng(0 if id_ < 4 else id_).integers(0, 256, (6, 6, 3)).repeat(5, 0).repeat(5, 1)
    return np.asarray({2: picture * 0.95, 3: picture[::-1]}.get(id_, picture), np.uint8)


def test_the_same_picture_with_different_labels_is_found(tmp_path: Path) -> None:
    labels = np.arange(12, dtype=np.int32) % 3
    root = make_dataset(tmp_path / "data", [12], render=patterns, labels=labels, num_classes=3)
    index, rank = Index.open(root, "train"), np.arange(12, 0, -1)
    assert [group.ids for group in exact(index, labels, rank)] == [[1, 0]]
    assert exact(index, np.zeros(12, np.int32), rank) == []

    graph = np.roll(np.arange(12), -1)[:, None]  # nobody is each other's nearest ...
    graph[[0, 1, 2, 3, 4, 5], 0] = [2, 0, 0, 4, 3, 5]  # ... but 0 and 2, 3 and 4
    found = list(near(graph, labels, rank, Reader(index, "skip", 30), 10))
    assert [group.ids for group in found] == [[2, 0]], "not 3 and 4, which look different"
    assert list(near(graph, np.zeros(12, np.int32), rank, Reader(index, "skip", 30), 10)) == []
