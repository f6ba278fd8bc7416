import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import yaml

from nldist.config import Config, Section
from nldist.config.file import load_config, parse_config
from nldist.config.marks import FREE, LATER, deciding, naming
from nldist.data.views import View
from nldist.errors import UserError
from nldist.methods.build import METHODS
from nldist.models.build import model_names
from nldist.run.directory import RunDirectory
from tests.conftest import REPOSITORY

CONFIGS = Path(__file__).parent.parent / "configs"
FRAGMENTS = sorted(path for folder in ("data", "method") for path in (CONFIGS / folder).glob("*.yaml"))
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path not in FRAGMENTS)

# A whole run, as small as it gets.
SMALL: dict[str, Any] = {
    "data": {"root": "somewhere"},
    "views": {"train": [{"op": "flip"}], "eval": []},
    "train": {"epochs": 20},
}


def name(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def write(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value), "an error is one line"
    return str(caught.value)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.yaml", SMALL)


# The configurations of the project


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_every_run_loads_and_its_yaml_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.model.name in model_names()
    assert load_config(write(tmp_path / "again.yaml", config.to_yaml())) == config


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_the_views_of_every_run_make_square_images_of_one_size(path: Path) -> None:
    config = load_config(path)
    side = {"demo": 8, "cifar10": 32, "cifar100": 32, "animal10n": 64}.get(name(path).split("/")[0])
    sizes = torch.tensor([[side, side]] * 2 if side else [[300, 260], [240, 400]])
    images = torch.zeros(2, 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
    shapes = {
        View(ops, config.data.mean, config.data.std)(images, sizes, torch.arange(2), (0, 0, 0)).shape
        for ops in (config.views.train, config.views.eval, config.views.strong)
        if ops is not None
    }
    assert len(shapes) == 1
    assert len(set(shapes.pop()[2:])) == 1


def test_no_two_runs_share_a_directory() -> None:
    places = [load_config(path).run.dir for path in RUNS]
    assert len(set(places)) == len(places)


def test_every_fragment_is_included_by_a_run() -> None:
    def included(path: Path) -> set[Path]:
        includes = yaml.safe_load(path.read_text()).get("include", [])
        files = {(path.parent / file).resolve() for file in ([includes] if isinstance(includes, str) else includes)}
        return files.union(*map(included, files))

    assert set(FRAGMENTS) <= set[Path]().union(*map(included, RUNS))


@pytest.mark.parametrize("path", [path for path in RUNS if "scanmix" in path.stem], ids=name)
def test_the_views_of_the_stages_make_square_images_of_one_size(path: Path) -> None:
    config = load_config(path)
    assert config.pretext is not None
    assert config.cluster is not None
    side = {"cifar10": 32, "cifar100": 32, "animal10n": 64}.get(path.parent.name)
    sizes = torch.tensor([[side, side]] * 2 if side else [[300, 260], [240, 400]])
    images = torch.zeros(2, 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
    for view in (config.pretext.view, config.cluster.view):
        shape = View(config.view(view), config.data.mean, config.data.std)(
            images, sizes, torch.arange(2), (0, 0, 0)
        ).shape
        assert shape[2] == shape[3] == (side or 224)


# ScanMix, 4.2 and the authors' code; lambda_u: DivideMix's table, which the paper refers to.
@pytest.mark.parametrize(
    ("run", "lambda_u", "warmup", "penalty", "history"),
    [
        ("cifar10/scanmix-sym20", 0, 10, False, 1),
        ("cifar10/scanmix-sym50", 25, 10, False, 1),
        ("cifar10/scanmix-sym80", 25, 10, False, 1),
        ("cifar10/scanmix-sym90", 50, 10, False, 5),
        ("cifar10/scanmix-asym40", 0, 10, True, 1),
        ("cifar10/scanmix-asym49", 0, 10, True, 1),
        ("cifar10/scanmix-semantic", 0, 10, True, 1),
        ("cifar100/scanmix-sym20", 25, 30, False, 1),
        ("cifar100/scanmix-sym50", 150, 30, False, 1),
        ("cifar100/scanmix-sym80", 150, 30, False, 1),
        ("cifar100/scanmix-sym90", 150, 30, False, 5),
    ],
)
def test_published_values_of_scanmix_on_cifar(
    run: str, lambda_u: float, warmup: int, penalty: bool, history: int
) -> None:
    config = load_config(CONFIGS / f"{run}.yaml")
    divide, scan = config.method.dividemix, config.method.scanmix
    assert (divide.lambda_u, divide.warmup_epochs, divide.warmup_penalty) == (lambda_u, warmup, penalty)
    assert (config.method.mixture.history, divide.tau, divide.alpha) == (history, 0.5, 4)
    assert (scan.lambda_e, scan.batch_size, scan.lr_low, scan.lr_high) == (5, 128, 1e-5, 1e-3)
    assert (scan.noise_threshold, scan.warmup_view, scan.ssl_view) == (0.6, "strong", "by_noise")
    assert config.mine.k == 20
    assert config.pretext is not None
    assert config.cluster is not None
    assert (config.pretext.name, config.pretext.epochs, config.pretext.batch_size) == ("simclr", 500, 512)
    assert (config.pretext.optim.lr, config.pretext.optim.min_lr, config.pretext.temperature) == (0.4, 4e-4, 0.1)
    expected = (50, 128) if run.startswith("cifar10/") else (100, 1024)
    assert (config.cluster.epochs, config.cluster.batch_size) == expected
    assert (config.cluster.optim.name, config.cluster.optim.lr, config.cluster.lambda_e) == ("adam", 1e-4, 5)


def test_mini_webvision_mines_crops_of_224_and_trains_on_227() -> None:
    """ScanMix's code for MoCo's features and for the training."""
    config = load_config(CONFIGS / "webvision" / "mini-scanmix.yaml")
    images, sizes = torch.zeros(1, 3, 300, 260, dtype=torch.uint8), torch.tensor([[300, 260]])
    sides = []
    for view in (config.mine.view, "train", "eval"):
        assert view is not None
        made = View(config.view(view), config.data.mean, config.data.std)(images, sizes, torch.arange(1), (0, 0, 0))
        sides.append(tuple(made.shape[2:]))
    assert sides == [(224, 224), (227, 227), (227, 227)]


def test_scanmix_without_a_section_says_which(small: Path) -> None:
    said = complaint(small, "method.name=scanmix")
    assert "needs pretext" in said
    assert "configs/clothing1m/scanmix.yaml" in said


# DivideMix, appendix table: lambda_u; 4.1: tau, warm-up; 3.1: the penalty; history: authors' code.
@pytest.mark.parametrize(
    ("run", "lambda_u", "tau", "warmup", "penalty", "history"),
    [
        ("cifar10/dividemix-sym20", 0, 0.5, 10, False, 1),
        ("cifar10/dividemix-sym50", 25, 0.5, 10, False, 1),
        ("cifar10/dividemix-sym80", 25, 0.5, 10, False, 1),
        ("cifar10/dividemix-sym90", 50, 0.6, 10, False, 5),
        ("cifar10/dividemix-asym40", 0, 0.5, 10, True, 1),
        ("cifar100/dividemix-sym20", 25, 0.5, 30, False, 1),
        ("cifar100/dividemix-sym50", 150, 0.5, 30, False, 1),
        ("cifar100/dividemix-sym80", 150, 0.5, 30, False, 1),
        ("cifar100/dividemix-sym90", 150, 0.6, 30, False, 5),
    ],
)
def test_published_values_on_cifar(
    run: str, lambda_u: float, tau: float, warmup: int, penalty: bool, history: int
) -> None:
    config = load_config(CONFIGS / f"{run}.yaml")
    divide, optim = config.method.dividemix, config.optim
    assert (divide.lambda_u, divide.tau, divide.warmup_epochs) == (lambda_u, tau, warmup)
    assert (divide.warmup_penalty, config.method.mixture.history) == (penalty, history)
    assert (divide.alpha, divide.temperature, divide.form) == (4, 0.5, "cifar")
    assert config.data.label_set == run.rpartition("-")[2]
    assert (config.train.epochs, config.train.batch_size) == (300, 128)
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.milestones) == (0.02, 0.9, 5e-4, [150])


@pytest.mark.parametrize(
    ("run", "lr", "weight_decay", "milestones", "epochs", "penalty", "reg_covar", "subset"),
    [
        ("webvision/mini-dividemix", 0.01, 5e-4, [50], 100, False, 1e-3, None),
        ("clothing1m/dividemix", 0.002, 1e-3, [40], 80, True, 5e-4, 32_000),
    ],
)
def test_published_values_on_real_noise(
    run: str,
    lr: float,
    weight_decay: float,
    milestones: list[int],
    epochs: int,
    penalty: bool,
    reg_covar: float,
    subset: int | None,
) -> None:
    config = load_config(CONFIGS / f"{run}.yaml")
    divide, optim = config.method.dividemix, config.optim
    assert (optim.lr, optim.weight_decay, optim.milestones) == (lr, weight_decay, milestones)
    assert (config.train.epochs, config.train.batch_size) == (epochs, 64)
    assert (divide.form, divide.alpha, divide.tau, divide.warmup_epochs) == ("real", 0.5, 0.5, 1)
    assert (divide.warmup_penalty, divide.subset, config.method.mixture.reg_covar) == (penalty, subset, reg_covar)


def test_the_full_runs_differ_from_the_published_ones_only_where_they_say_so() -> None:
    def differing(one: str, other: str) -> set[str]:
        first, second = (load_config(CONFIGS / f"{run}.yaml").flat() for run in (one, other))
        return {key for key in first if first[key] != second[key]}

    assert differing("clothing1m/dividemix", "clothing1m/dividemix-full") == {
        *("run.dir", "optim.milestones", "train.epochs", "train.autocast"),
        *("method.dividemix.subset", "method.dividemix.warmup_subset"),
    }
    assert differing("webvision/mini-dividemix", "webvision/full-dividemix") == {
        *("run.dir", "data.root", "data.window", "optim.lr_rule_epochs", "optim.milestones"),
        *("train.epochs", "train.autocast", "method.dividemix.warmup_epochs"),
    }


@pytest.mark.parametrize(
    ("folder", "prefix"),
    [
        ("cifar10", ""),
        ("cifar100", ""),
        ("animal10n", ""),
        ("clothing1m", ""),
        ("webvision", "mini-"),
        ("webvision", "full-"),
    ],
)
def test_every_data_set_has_every_method(folder: str, prefix: str) -> None:
    for name in (*METHODS, "sanm"):
        config = load_config(CONFIGS / folder / f"{prefix}{name}.yaml")
        assert (config.method.name, config.method.ssl) == (
            (name, "mixmatch") if name in METHODS else ("dividemix", name)
        )


# Includes and overrides


def test_a_later_include_wins_over_an_earlier_one_and_the_file_over_both(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "base.yaml", SMALL | {"optim": {"lr": 0.1, "momentum": 0.5, "milestones": [1, 2]}})
    write(tmp_path / "parts" / "more.yaml", {"optim": {"lr": 0.2, "milestones": [3]}})
    run = write(tmp_path / "run.yaml", {"include": ["parts/base.yaml", "parts/more.yaml"], "train": {"epochs": 12}})
    config = load_config(run, ["optim.momentum=0.7"])
    assert (config.optim.lr, config.optim.momentum, config.train.epochs) == (0.2, 0.7, 12)
    assert config.optim.milestones == [3], "a list is replaced, not joined"


def test_an_include_is_relative_to_the_file_that_says_it(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "deep" / "data.yaml", SMALL)
    write(tmp_path / "parts" / "base.yaml", {"include": "deep/data.yaml"})
    assert load_config(write(tmp_path / "run.yaml", {"include": "parts/base.yaml"})).train.epochs == 20


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.window=whole", None),
        ("data.window=100", 100),
        ("data.window=null", None),
    ],
)
def test_the_window_may_be_whole(small: Path, override: str, expected: int | None) -> None:
    assert load_config(small, [override]).data.window == expected


def test_overrides_are_read_as_yaml(small: Path) -> None:
    config = load_config(
        small, ["optim.lr=5e-4", "optim.milestones=[3, 4]", "data.label_set=null", "views.eval=[{op: flip, p: 0.0}]"]
    )
    assert (config.optim.lr, config.optim.milestones, config.data.label_set) == (5e-4, [3, 4], None)
    assert config.views.eval[0].op == "flip"


# Errors


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.epoch=3", "train.epochs"),
        ("method.dividemix.lamda_u=5", "method.dividemix.lambda_u"),
        ("tain.epochs=3", "train"),
    ],
)
def test_an_unknown_key_gets_the_nearest_right_one(small: Path, override: str, nearest: str) -> None:
    text = complaint(small, override)
    assert f"is not a setting; did you mean {nearest}" in text


def test_a_key_that_is_near_none_gets_the_list(small: Path) -> None:
    text = complaint(small, "optim.learning_rate=0.1")
    assert "optim.learning_rate is not a setting; the settings here are optim.name, optim.lr" in text
    assert str(small) in text


@pytest.mark.parametrize(
    ("include", "words"), [("include:", "must be a list of files"), ("include: [3]", "must be a list of files")]
)
def test_an_include_that_is_no_file_is_refused(small: Path, include: str, words: str) -> None:
    small.write_text(f"{include}\n{small.read_text()}")
    assert words in complaint(small)


def test_a_file_that_is_not_text_is_refused(small: Path) -> None:
    small.write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in complaint(small)


def test_yaml_cannot_make_objects(small: Path) -> None:
    small.write_text("run: !!python/object/apply:os.mkdir [pwned]\n")
    assert "not valid YAML" in complaint(small)
    assert not Path("pwned").exists()


def test_names_may_look_like_numbers(small: Path) -> None:
    config = load_config(small, ["run.dir=2024", "data.label_set=50"])
    assert (config.run.dir, config.data.label_set) == (Path("2024"), "50")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs=0", "train.epochs=0: Input should be greater than or equal to 1"),
        ("train.epochs=many", "train.epochs='many'"),
        ("train.autocast=fp16", "'off' or 'bf16'"),
        ("method.name=dividemax", "'dividemix'"),
        ("method.dividemix.warmup_epochs=21", "more than train.epochs=20"),
        ("method.name=m_correction", "method.m_correction.warmup_epochs=105 is more than train.epochs=20"),
        ("method.name=pencil", "warmup_epochs=70 and method.pencil.correction_epochs=130 is more than train.epochs"),
        ("views.train=[{op: twirl}]", "'flip'"),
        ("data.window=some", "data.window='some'"),
        ("track=", "track"),
        ("engine.zero_stage=3", "engine.zero_stage=3: Input should be less than or equal to 2"),
        ("engine.zero_stage=2", "engine.zero_stage is for DeepSpeed; set engine.name=deepspeed, or leave it out"),
        ("engine.config=own.json", "engine.config is for DeepSpeed; set engine.name=deepspeed"),
        ("engine.nam=deepspeed", "did you mean engine.name?"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_right(small: Path, override: str, words: str) -> None:
    assert words in complaint(small, override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.dividemix.warmup_epochs=0"], "needs method.dividemix.warmup_epochs of 1 or more"),
        (["pretext.epochs=0"], "keeps the backbone of model.pretrained; set that"),
        (["pretext.epochs=0", "model.pretrained=a.pt", "mine.layer=projector"], "set mine.layer=backbone"),
    ],
)
def test_what_scanmix_cannot_do_is_refused(overrides: list[str], words: str) -> None:
    settings = ["data.root=x", "method.name=scanmix"]
    assert words in complaint(REPOSITORY / "tests" / "digits.yaml", *settings, *overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs", "must look like train.epochs=10"),
        ("=3", "must look like train.epochs=10"),
        ("data.root.place=x", "root is a value, not a section"),
    ],
)
def test_a_malformed_override_is_refused(small: Path, override: str, words: str) -> None:
    assert words in complaint(small, override)


def test_a_missing_setting_is_asked_for(tmp_path: Path) -> None:
    text = complaint(write(tmp_path / "run.yaml", SMALL | {"train": {"batch_size": 8}}))
    assert "train.epochs is missing; set it in the file or as train.epochs=..." in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"include": "absent.yaml"}, "absent.yaml cannot be read: No such file"),
        ({"include": "run.yaml"}, "run.yaml includes itself"),
        ("train: {epochs: 3", "is not valid YAML"),
        ("- 1\n- 2\n", "must hold sections such as 'data:' and 'train:', not list"),
        ("", "must hold sections"),
        ("run: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: Any, words: str) -> None:
    assert words in complaint(write(tmp_path / "run.yaml", content))


def test_a_cycle_of_includes_is_found(tmp_path: Path) -> None:
    for first, second in ("ab", "bc", "ca"):
        write(tmp_path / f"{first}.yaml", {"include": f"{second}.yaml"})
    assert "a.yaml includes itself, by way of a.yaml -> b.yaml -> c.yaml" in complaint(tmp_path / "a.yaml")


def test_one_file_may_be_included_twice(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", SMALL)
    for middle in "ab":
        write(tmp_path / f"{middle}.yaml", {"include": "base.yaml"})
    run = write(tmp_path / "run.yaml", {"include": ["a.yaml", "b.yaml"]})
    assert load_config(run).train.epochs == 20


def test_a_configuration_is_fixed_once_read(small: Path) -> None:
    config = load_config(small)
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("word", ["off", "'off'", "bf16"])
def test_a_word_that_yaml_takes_for_false(word: str, small: Path) -> None:
    assert load_config(small, [f"train.autocast={word}"]).train.autocast == word.strip("'")


# What may change between the starts of a run


def free(config: Config) -> set[str]:
    return set(config.flat()) - set(deciding(config))


def test_the_free_settings_are_those_that_change_nothing_that_is_learnt() -> None:
    config = load_config(REPOSITORY / "tests" / "digits.yaml")
    sections = {name for name in config.flat() if name.startswith(("dist.", "engine.", "track."))}
    assert "engine.zero_stage" in sections
    assert free(config) == sections | {
        *("run.dir", "run.stages_dir", "data.root", "data.num_workers", "data.cache_dir", "data.cache_gib"),
        *("data.labels_dir", "data.test_split", "data.decoded_cache_gib"),
        *("train.checkpoint_every_steps", "train.keep_checkpoints", "mine.block"),
        *("pretext.knn_every", "pretext.knn_k", "pretext.knn_samples"),
    }


class Inner(Section):
    old: int = 1
    new: Annotated[list[int] | None, LATER] = None
    speed: Annotated[int, FREE] = 3


class Outer(Section):
    inner: Inner = Inner()
    machine: Annotated[Inner, FREE] = Inner()


def test_a_later_setting_names_only_where_it_has_not_its_default() -> None:
    assert naming(Outer()) == {"inner.old": 1}
    assert naming(Outer(inner=Inner(new=[2], speed=9))) == {"inner.old": 1, "inner.new": [2]}
    assert deciding(Outer()) == {"inner.old": 1, "inner.new": None}


@pytest.fixture
def old_run(tmp_path: Path) -> RunDirectory:
    """A run directory with a checkpoint, with the settings as nldist 0.1 (commit c551f53) wrote them."""
    run = RunDirectory(tmp_path / "run")
    (run.path / "checkpoints" / "e0001-p00-s000000000").mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "old" / "config.yaml", run.path / "config.yaml")
    return run


def test_a_run_directory_of_the_release_before_goes_on(old_run: RunDirectory) -> None:
    saved = yaml.safe_load((old_run.path / "config.yaml").read_text())
    settings = ["data.root=elsewhere", "method.name=scanmix"]
    now = load_config(REPOSITORY / "tests" / "digits.yaml", settings)
    assert "view" not in saved["mine"], "a setting that came later"
    for overrides in ([], ["pretext.knn_every=9", "track.enabled=false", "data.num_workers=3"]):
        old_run.claim(load_config(REPOSITORY / "tests" / "digits.yaml", [*settings, *overrides]))
        old_run.close()
    saved["engine"] |= {"name": "deepspeed", "zero_stage": 3}  # there is none any more, and it decides nothing
    del saved["optim"]["gamma"], saved["data"]["window"]
    (old_run.path / "config.yaml").write_text(yaml.safe_dump(saved))
    old_run.claim(now)
    old_run.close()


def test_what_the_user_changed_is_named_and_nothing_else(old_run: RunDirectory) -> None:
    settings = ["method.name=scanmix", "optim.lr=0.03", "mine.view=[]", "run.dir=elsewhere"]
    with pytest.raises(UserError) as caught:
        old_run.claim(load_config(REPOSITORY / "tests" / "digits.yaml", settings))
    assert str(caught.value) == (
        f"{old_run.path} holds a run with other settings: mine.view (None -> []), optim.lr (0.02 -> 0.03); "
        "set another run.dir or delete the old run"
    )
    old_run.close()


def test_a_section_s_view_is_one_of_views_or_spelt_out() -> None:
    digits = REPOSITORY / "tests" / "digits.yaml"
    named = load_config(digits, ["views.soft=[{op: flip}]", "pretext.view=soft", "mine.view=eval"])
    spelt = load_config(digits, ["pretext.view=[{op: flip}]"])
    assert named.pretext is not None
    assert spelt.pretext is not None
    assert named.view(named.pretext.view) == spelt.view(spelt.pretext.view)
    assert parse_config(named.to_yaml(), "saved") == named
    for overrides, told in (
        (
            ["views.soft=[{op: flip}]", "pretext.view=sort"],
            "pretext.view=sort, but views has no sort; did you mean soft?",
        ),
        (["cluster.view=nothing"], "views has no nothing; there are train, strong, eval"),
        (["views.soft=[{op: flip, q: 1}]"], "views.soft.0.flip.q is not a setting"),
        (["pretext.view=[{op: flip, q: 1}]"], "pretext.view.0.flip.q is not a setting"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            load_config(digits, overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [("runs/a #1", "runs/a #1"), ("#1", "#1"), ("'a #b'", "a #b"), ("runs/a#1", "runs/a#1"), ("2024", "2024")],
)
def test_nothing_of_an_override_is_a_comment(text: str, value: str) -> None:
    assert load_config(REPOSITORY / "tests" / "digits.yaml", [f"track.run_name={text}"]).track.run_name == value
    assert "valid integer" in complaint(REPOSITORY / "tests" / "digits.yaml", "train.epochs=5 # five")
