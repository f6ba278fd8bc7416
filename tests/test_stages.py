import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nldist.cli import main
from nldist.config.file import load_config
from nldist.data.index import Index
from nldist.dist.world import World
from nldist.errors import UserError
from nldist.estimate.graph import normalise
from nldist.passes.data import Data
from nldist.pretext.mine import MINE, Mine
from nldist.run.directory import RunDirectory
from nldist.train.audit import _graph
from nldist.train.stages import _is_done, check_stages, stage_directories, stages_of
from tests.contexts import open_context
from tests.jobs import DIGITS, output, run_job
from tests.test_train import assert_same_weights, epoch_records

SHORT = (
    "method.name=scanmix",
    "train.epochs=2",
    "method.dividemix.warmup_epochs=1",
    "train.checkpoint_every_steps=5",
    "train.eval_batch_size=128",
)
STAGES = ("pretext", "mine", "cluster")
# Of tests/digits.yaml with SHORT and the images "same", as nldist 0.1 (commit c551f53) named them.
OLD_DIGESTS = {"pretext-89a8590ea0", "mine-86e06c0906", "cluster-87870e7756"}
OLD_DIGESTS_PREACT = {"pretext-483ed8e6a6", "mine-8e94f9e719", "cluster-416cf55c29"}


def job(digits: Path, run_dir: Path, *overrides: str, **options: object) -> list[int | None]:
    return run_job(run_dir, f"data.root={digits}", *SHORT, *overrides, **options)  # type: ignore[arg-type]


def stage(run_dir: Path, name: str) -> Path:
    (path,) = (run_dir / "stages").glob(f"{name}-*")
    return path


@pytest.fixture(scope="module")
def undisturbed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert job(digits, run_dir, world_size=2) == [0, 0]
    return run_dir


def test_one_command_runs_all_stages_and_each_leaves_its_product(undisturbed: Path) -> None:
    for name in STAGES:
        summary = json.loads((stage(undisturbed, name) / "summary.json").read_text())
        assert summary["stage"] == name
        assert not (stage(undisturbed, name) / "checkpoints").exists()
    graph = np.load(stage(undisturbed, "mine") / "tables" / "neighbours.npy")
    assert graph.shape == (1437, 10)
    assert (graph != np.arange(1437)[:, None]).all()
    purity = json.loads((stage(undisturbed, "mine") / "summary.json").read_text())["purity"]
    labels = load_labels(undisturbed)
    assert purity["final"] == pytest.approx(100 * (labels[graph] == labels[:, None]).mean())
    plots = stage(undisturbed, "mine") / "plots"
    assert [path.name for path in plots.iterdir()] == ["purity.png"]
    assert (stage(undisturbed, "pretext") / "plots" / "knn_accuracy.png").exists()
    assert json.loads((undisturbed / "summary.json").read_text())["method"] == "scanmix"


def load_labels(run_dir: Path) -> np.ndarray:
    from nldist.data.index import Index

    config = load_config(run_dir / "config.yaml")
    return Index.open(config.data.root, "train").labels(config.data.label_set)


def test_the_audit_finds_the_neighbours_of_the_run_s_own_stages(undisturbed: Path, digits: Path) -> None:
    run, index = RunDirectory(undisturbed), Index.open(digits, "train")
    graph = _graph(run.config(), index)
    np.testing.assert_array_equal(graph, np.load(stage(undisturbed, "mine") / "tables" / "neighbours.npy"))
    assert _graph(run.config(["mine.k=9"]), index) is None
    assert _graph(run.config(["method.name=dividemix"]), index) is None


def test_each_stage_alone_killed_and_started_again_ends_with_the_same_weights(
    digits: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert job(digits, run_dir, "--stages", "cluster") == [2]
    assert "stage pretext is not done" in output(run_dir)
    for number, (name, num_steps) in enumerate({"pretext": 16, "mine": 8, "cluster": 16, "train": 40}.items()):
        victim, other = number % 2, 1 - number % 2
        codes = job(digits, run_dir, "--stages", name, world_size=2, kill=(victim, num_steps))
        assert (codes[victim], codes[other]) == (-9, 1), "the other rank must end, not wait"
        again = ("--stages", name) if name != "train" else ()
        assert job(digits, run_dir, *again, world_size=2) == [0, 0]
    assert output(run_dir).count("resumed from") == 4
    for name in STAGES:
        assert f"{name}: done before" in output(run_dir)
        assert epoch_records(stage(run_dir, name)) == epoch_records(stage(undisturbed, name))
    one, other_graph = (stage(run, "mine") / "tables" / "neighbours.npy" for run in (run_dir, undisturbed))
    assert one.read_bytes() == other_graph.read_bytes()
    assert_same_weights(stage(undisturbed, "pretext"), stage(run_dir, "pretext"))
    assert_same_weights(undisturbed, run_dir)
    assert epoch_records(run_dir) == epoch_records(undisturbed)
    assert job(digits, run_dir, "--stages", "mining") == [2]
    assert "no stage 'mining'; its stages are pretext, mine, cluster, train" in output(run_dir)


@pytest.mark.slow
def test_killed_in_every_stage_ends_with_the_same_weights(digits: Path, undisturbed: Path, tmp_path: Path) -> None:
    random.seed(3)
    run_dir = tmp_path / "run"
    codes: list[int | None] = []
    num_kills = 0
    while codes != [0, 0]:
        victim = random.randrange(2)
        codes = job(digits, run_dir, world_size=2, kill=(victim, random.randint(6, 22)))
        num_kills += codes != [0, 0]
        assert codes in ([0, 0], [-9, 1], [1, -9]), "the other rank must end, not wait"
    text = output(run_dir)
    assert num_kills > 8
    for name in STAGES:
        assert f"{name}: done before" in text
        assert epoch_records(stage(run_dir, name)) == epoch_records(stage(undisturbed, name))
    one, other = (stage(run, "mine") / "tables" / "neighbours.npy" for run in (run_dir, undisturbed))
    assert one.read_bytes() == other.read_bytes()
    assert_same_weights(stage(undisturbed, "pretext"), stage(run_dir, "pretext"))
    assert_same_weights(undisturbed, run_dir)
    assert epoch_records(run_dir) == epoch_records(undisturbed)


def test_a_stopped_stage_saves_and_its_last_epoch_goes_on_with_other_ranks(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    in_the_second_epoch = (1, 12)
    codes = job(digits, run_dir, "train.checkpoint_every_steps=0", world_size=2, stop=in_the_second_epoch)
    assert codes == [143, 143]
    assert "stopped at" in output(run_dir)
    assert job(digits, run_dir, "train.epochs=2", world_size=3) == [0, 0, 0]
    assert "with 3 rank(s), written by 2" in output(run_dir)
    assert re.search(r"another number of ranks: global batch (\d+) -> (\d+), lr stays", output(run_dir))


def test_the_graph_does_not_depend_on_the_number_of_ranks(digits: Path, undisturbed: Path, tmp_path: Path) -> None:
    """From the same pretext weights."""
    run_dir, name = tmp_path / "run", stage(undisturbed, "pretext").name
    (run_dir / "stages").mkdir(parents=True)
    (run_dir / "stages" / name).symlink_to(stage(undisturbed, "pretext"))
    run_stages(digits, run_dir, "mine", "track.every_seconds=1e-9", world_size=3)
    progress = [line for line in output(run_dir).splitlines() if " step " in line]
    assert ["img/s" in line for line in progress] == ["search" not in line for line in progress], progress
    one, other = (np.load(stage(run, "mine") / "tables" / "neighbours.npy") for run in (run_dir, undisturbed))
    # Features are the network's in another batch: the last bits differ, and so may neighbours that are nearly tied.
    assert (one == other).mean() > 0.999


def test_a_search_goes_on_with_other_ranks(digits: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir, name = tmp_path / "run", stage(undisturbed, "pretext").name
    (run_dir / "stages").mkdir(parents=True)
    (run_dir / "stages" / name).symlink_to(stage(undisturbed, "pretext"))
    settings = ("train.checkpoint_every_steps=1", "--stages", "mine")
    assert job(digits, run_dir, *settings, world_size=2, kill=(1, 9)) == [1, -9]
    saved = max((stage(run_dir, "mine") / "checkpoints").glob("e0001-p00-s*"))
    assert job(digits, run_dir, *settings, world_size=3) == [0, 0, 0]
    assert f"resumed from {saved.name} with 3 rank(s), written by 2" in output(run_dir)
    one, other = (stage(run, "mine") / "tables" / "neighbours.npy" for run in (run_dir, undisturbed))
    assert one.read_bytes() == other.read_bytes()


def run_stages(digits: Path, run_dir: Path, stages: str, *overrides: str, world_size: int = 1) -> None:
    assert job(digits, run_dir, *overrides, "--stages", stages, world_size=world_size) == [0] * world_size


@pytest.mark.parametrize("is_old", [False, True], ids=["ours", "as nldist 0.1 saved it"])
def test_mining_goes_on_within_the_search_with_the_same_vectors(is_old: bool, digits: Path) -> None:
    """They are scaled in place, once: a checkpoint says whether its features are; those of before are not."""

    def mine() -> Mine:
        return Mine(open_context(load_config(DIGITS, [f"data.root={digits}", "method.name=scanmix"]), stage=MINE))

    first, again = mine(), mine()
    features = torch.from_numpy(np.random.default_rng(0).normal(size=first.column.rows.shape)).float()
    first.column.rows.copy_(features)
    vectors = first.vectors().copy()
    np.testing.assert_array_equal(vectors, normalise(features.numpy()))
    state = first.state_dict()
    if is_old:
        del state["normalised"]
    again.load_state_dict(state)
    again.column.rows.copy_(features if is_old else first.column.rows)
    np.testing.assert_array_equal(again.vectors(), vectors)
    np.testing.assert_array_equal(again.vectors(), vectors)


def test_a_stage_is_run_again_exactly_when_its_inputs_change(digits: Path) -> None:
    def directories(*overrides: str, images: str = "same") -> dict[str, Path]:
        config = load_config(DIGITS, [f"data.root={digits}", *SHORT, *overrides])
        return stage_directories(config, images)

    before = directories()
    assert list(before) == list(STAGES)
    for override, rerun in {
        "train.epochs=4": set(),
        "data.label_set=clean": set(),
        "data.num_workers=2": set(),
        "method.scanmix.lambda_e=1": set(),
        "mine.block=7": set(),
        "pretext.knn_every=3": set(),
        "views.eval=[{op: center_crop, size: 7}]": {"mine", "cluster"},
        "cluster.epochs=3": {"cluster"},
        "mine.k=5": {"mine", "cluster"},
        "pretext.temperature=0.3": set(STAGES),
        "run.seed=1": set(STAGES),
        "model.name=resnet18_cifar": set(STAGES),
    }.items():
        after = directories(override)
        assert {name for name in STAGES if after[name] != before[name]} == rerun, override
    assert not set(directories(images="other").values()) & set(before.values())


def test_stages_of_the_release_before_are_found() -> None:
    """The digests that nldist 0.1 gave, but for the network whose weights mean another one since."""
    config = load_config(DIGITS, SHORT)
    names = {path.name for path in stage_directories(config, "same").values()}
    assert names == OLD_DIGESTS
    config = load_config(DIGITS, [*SHORT, "model.name=preact_resnet18"])
    assert not {path.name for path in stage_directories(config, "same").values()} & OLD_DIGESTS_PREACT


def test_the_features_are_mined_in_a_view_of_their_own(digits: Path) -> None:
    settings = [f"data.root={digits}", *SHORT, "mine.view=[{op: center_crop, size: 7}]"]
    config, unset = load_config(DIGITS, settings), load_config(DIGITS, settings[:-1])
    assert (mined := stage_directories(config, "same")["mine"]) != stage_directories(unset, "same")["mine"]
    settings.append("views.eval=[{op: center_crop, size: 6}]")
    assert stage_directories(load_config(DIGITS, settings), "same")["mine"] == mined, "it does not look at views.eval"
    for stage, side in zip(stages_of(config), (6, 7, 6, 6), strict=True):
        context = open_context(load_config(DIGITS, settings), stage=stage)
        batch = next(iter(context.stream("train", context.sweep(8))))["all"]
        assert context.fixed_view(batch).shape[2:] == (side, side), stage.name


def test_pretrained_weights_count_by_their_content(digits: Path, tmp_path: Path) -> None:
    def directories(name: str, content: bytes) -> list[Path]:
        (tmp_path / name).write_bytes(content)
        overrides = [f"data.root={digits}", *SHORT, f"model.pretrained={tmp_path / name}"]
        return list(stage_directories(load_config(DIGITS, overrides), "same").values())

    before = directories("a.pt", b"weights")
    assert directories("b.pt", b"weights") == before
    assert not set(directories("a.pt", b"others")) & set(before)
    (tmp_path / "a.pt").unlink()
    config = load_config(DIGITS, [*SHORT, f"model.pretrained={tmp_path / 'a.pt'}"])
    with pytest.raises(UserError, match=r"a\.pt cannot be read: No such file"):
        stage_directories(config, "same")


def test_a_stage_that_another_job_runs_is_left_to_it(digits: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = load_config(
        DIGITS,
        [f"run.dir={run_dir}", f"data.root={digits}", *SHORT, "dist.num_threads=1", "dist.device=cpu"],
    )
    path = stage_directories(config, Data.open(config.data).fingerprint(labels=False))["pretext"]
    other = RunDirectory(path)
    other.claim(None)
    assert job(digits, run_dir) == [2]
    text = output(run_dir)
    assert "is in use by a running job; another job is running stage pretext there; start this one again" in text
    other.close()


def test_a_stage_that_ended_before_its_claim_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job ends it between this one's first look and its claim."""
    run = RunDirectory(tmp_path / "stage")
    claim = run.claim

    def claim_late(config: None, advice: str, patience_seconds: float) -> None:
        run.path.mkdir()
        run.write_summary({"stage": "mine"})
        claim(config, advice, patience_seconds=patience_seconds)

    monkeypatch.setattr(run, "claim", claim_late)
    assert _is_done("mine", run, World.single(), claim=True)
    RunDirectory(run.path).claim(None)  # it is nobody's


def test_a_stage_predicts_no_classes(
    digits: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("pretext", "cluster"):
        for command in (["compare"], ["evaluate"]):
            assert main([*command, str(stage(undisturbed, name))]) == 2
            assert f"holds the stage {name} of a run, which predicts no classes" in capsys.readouterr().err


def test_runs_share_stages_and_other_labels_do_not_matter(digits: Path, undisturbed: Path, tmp_path: Path) -> None:
    shared = f"run.stages_dir={undisturbed / 'stages'}"
    assert job(digits, tmp_path / "run", shared, "data.label_set=clean", "train.epochs=1", world_size=2) == [0, 0]
    assert output(tmp_path / "run").count("done before") == 3
    assert not (tmp_path / "run" / "stages").exists()


def test_without_pretext_epochs_the_backbone_stays_as_it_came(digits: Path, tmp_path: Path) -> None:
    from nldist.models import build_model

    torch.manual_seed(11)
    given = build_model("small_cnn", 10)
    torch.save(given.state_dict(), tmp_path / "given.pt")
    run_dir = tmp_path / "run"
    settings = ("pretext.epochs=0", f"model.pretrained={tmp_path / 'given.pt'}", "mine.layer=backbone")
    run_stages(digits, run_dir, "pretext,mine", *settings)
    state = torch.load(stage(run_dir, "pretext") / "weights" / "last.pt", weights_only=True)["networks"][0]
    for name, value in given.backbone.state_dict().items():
        assert torch.equal(state[f"backbone.{name}"], value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("mine.factory=IVF512,Flat", "the index 'IVF512,Flat' has more lists than there are vectors (360)"),
        ("mine.factory=IVF", "FAISS knows no index 'IVF'"),
        ("mine.num_probe=4", "num_probe is for IVF indexes"),
        ("cluster.holdout=0.999", "cluster.holdout=0.999 leaves"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    override: str, told: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the 360 images of the evaluation split."""
    settings = [f"data.root={digits}", *SHORT, "data.train_split=test", "data.label_set=null", override]
    for command in (["dry-run", str(DIGITS)], ["train", str(DIGITS), f"run.dir={tmp_path / 'run'}", "dist.device=cpu"]):
        assert main([*command, *settings]) == 2
        assert told in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("stages/*/weights/*"))


def test_more_neighbours_than_images_are_refused(digits: Path) -> None:
    config = load_config(DIGITS, [f"data.root={digits}", *SHORT, "mine.k=12"])
    (mine,) = (stage for stage in stages_of(config) if stage.name == "mine")
    few: Any = SimpleNamespace(train=range(12))
    with pytest.raises(UserError, match=r"mine\.k=12 neighbours, but an image has 11 others"):
        mine.check(config, few, 1)
    mine.check(load_config(DIGITS, [*SHORT, "mine.k=11"]), few, 1)


def test_a_full_disk_is_told_before_the_first_stage_but_not_of_what_is_done(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(DIGITS, [f"data.root={digits}", f"run.dir={tmp_path / 'run'}", *SHORT])
    data, directories = Data.open(config.data), stage_directories(config, "same")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 1437 * (10 + 16) - 1))
    with pytest.raises(UserError, match=r"the stages leave 0\.0 GiB below .*, where 0\.0 are free"):
        check_stages(config, data, directories, 1)
    directories["mine"].mkdir(parents=True)
    check_stages(config, data, directories, 1)
    odd = load_config(DIGITS, [f"run.dir={tmp_path / 'run'}", *SHORT, "mine.factory=IVF2000,Flat"])
    with pytest.raises(UserError, match="more lists than there are vectors"):
        check_stages(odd, data, directories, 1)
    (directories["mine"] / "summary.json").write_text("{}")
    check_stages(odd, data, directories, 1)
