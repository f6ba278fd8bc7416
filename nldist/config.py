"""The typed configuration of a run: one class per part, every field documented. `nldist.config_file` reads it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nldist.data.views import ViewOp


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _text(value: Any) -> Any:
    """Names that YAML reads as numbers, such as a run directory 2024, are names."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Name = Annotated[str, BeforeValidator(_text)]
File = Annotated[Path, BeforeValidator(_text)]


class RunSection(Section):
    """Where the run keeps its files, and its randomness."""

    dir: File = Field(Path("runs/unnamed"), description="run directory: checkpoints, metrics, plots, summary")
    stages_dir: File | None = Field(
        None, description="where earlier stages keep their products, for several runs to share; none = in run.dir"
    )
    seed: int = Field(0, ge=0, description="every random decision of the run follows from it")


def _whole_window(value: Any) -> Any:
    return None if value == "whole" else value


class DataSection(Section):
    """The data set on disk and how it is read."""

    root: File = Field(description="data set directory made by tools/shard.py (holds dataset.json)")
    train_split: Name = Field("train", description="split to train on")
    eval_split: Name = Field("test", description="split that accuracy is measured on after every epoch")
    label_set: Name | None = Field(None, description="labels to train with; none = the labels in the shards")
    clean_label_set: Name = Field("clean", description="true labels, where known: only used to measure the split")
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="RGB mean in [0, 1]")
    std: tuple[float, float, float] = Field((0.25, 0.25, 0.25), description="RGB standard deviation in [0, 1]")
    num_workers: int = Field(2, ge=0, description="reading and decoding processes per rank; 0 = in the rank itself")
    window: Annotated[int | None, BeforeValidator(_whole_window)] = Field(
        16384, description="records shuffled together, so that reads stay sequential; 'whole' = all of a rank's"
    )
    on_bad: Literal["skip", "refuse"] = Field("skip", description="what to do with a record that cannot be decoded")
    max_side: int = Field(512, ge=8, description="images with a longer side (pixels) are shrunk when decoded")
    cache_dir: File | None = Field(None, description="node-local directory for copies of remote shards")
    cache_gib: float = Field(100.0, gt=0, description="size limit of cache_dir in GiB")


class ViewsSection(Section):
    """Augmentations, as lists of operations (see nldist.data.views)."""

    train: list[ViewOp] = Field(description="random view for training")
    strong: list[ViewOp] | None = Field(None, description="strong random view (ScanMix)")
    eval: list[ViewOp] = Field(description="fixed view for sweeps and evaluation")


class ModelSection(Section):
    """The network."""

    name: Name = Field("preact_resnet18", description="one of nldist.models or any timm model")
    pretrained: File | None = Field(None, description="file of backbone weights (.pt, .safetensors) to start from")
    channels_last: bool = Field(True, description="memory format of weights and images")
    compile: bool = Field(False, description="torch.compile the network")


Optimizer = Literal["sgd", "adam", "lars", "lamb"]


class OptimSection(Section):
    """The optimiser and its learning rate."""

    name: Optimizer = "sgd"
    lr: float = Field(0.02, gt=0, description="learning rate for a global batch of lr_batch samples")
    lr_batch: int | None = Field(
        None,
        ge=1,
        description="samples per optimiser step of all ranks that lr is meant for; none = for any number",
    )
    lr_rule: Literal["linear", "sqrt", "none"] = Field(
        "linear", description="how lr grows with the global batch: in proportion, with its root, not at all"
    )
    lr_rule_epochs: float = Field(
        5.0, ge=0, description="epochs over which lr grows from its own value to the larger one that the rule gives"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD and LARS")
    weight_decay: float = Field(5e-4, ge=0)
    nesterov: bool = Field(False, description="of SGD and LARS")
    schedule: Literal["step", "cosine"] = Field(
        "step", description="step: times gamma at each milestone; cosine: towards min_lr, once per epoch"
    )
    milestones: list[int] = Field([], description="epochs at which schedule=step multiplies the rate by gamma")
    gamma: float = Field(0.1, gt=0, le=1)
    min_lr: float = Field(0.0, ge=0, description="end of schedule=cosine")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear increase from 0 at the start")
    clip_norm: float | None = Field(None, gt=0, description="largest allowed norm of the gradient")
    accumulate: int = Field(1, ge=1, description="batches per optimiser step")


class TrainSection(Section):
    """Length, batches, precision and checkpoints."""

    epochs: int = Field(ge=1, description="epochs in all, warm-up included")
    batch_size: int = Field(
        128, ge=4, description="samples per step, rank and network; DivideMix: half labelled, half unlabelled"
    )
    eval_batch_size: int = Field(512, ge=1, description="samples per step and rank in sweeps and evaluation")
    autocast: Literal["off", "bf16"] = Field("off", description="precision of the forward and backward pass")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="evaluate averaged weights with this decay per step")
    checkpoint_every_steps: int = Field(1000, ge=0, description="also within an epoch; 0 = at epoch ends only")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")


class MixtureSection(Section):
    """The two-component mixture over the losses (algorithms 1.3, 1.4; defaults of the reference)."""

    max_iter: int = Field(10, ge=1, description="EM iterations at most; the early stop is part of the method")
    tol: float = Field(1e-2, gt=0, description="stop when the mean log-likelihood changes by less")
    reg_covar: float = Field(5e-4, gt=0, description="added to both variances")
    history: int = Field(1, ge=1, description="epochs of normalised losses averaged (reference: 5 at 90 % noise)")


class PretextOptim(OptimSection):
    """The optimiser of stage pretext; SimCLR's values."""

    lr: float = Field(0.4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    schedule: Literal["step", "cosine"] = "cosine"
    min_lr: float = Field(0.0, ge=0)


class ClusterOptim(OptimSection):
    """The optimiser of stage cluster; SCAN's values."""

    name: Optimizer = "adam"
    lr: float = Field(1e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)


class PretextSection(Section):
    """Stage pretext: self-supervised training of the backbone (algorithms 3.b A)."""

    name: Literal["simclr", "moco"] = "simclr"
    epochs: int = Field(500, ge=0, description="0 = keep the backbone of model.pretrained")
    batch_size: int = Field(512, ge=4, description="images per step and rank, two views of each")
    view: list[ViewOp] = Field(description="random view, drawn twice for each image")
    optim: PretextOptim = PretextOptim()
    dim: int = Field(128, ge=2, description="features of the projector")
    temperature: float = Field(0.1, gt=0)
    momentum: float = Field(0.999, ge=0, lt=1, description="of MoCo's momentum encoder, per step")
    queue: int = Field(65536, ge=4, description="past keys that MoCo compares with")
    knn_every: int = Field(10, ge=1, description="epochs between measurements of the k-NN accuracy")
    knn_k: int = Field(20, ge=1, le=256, description="neighbours that vote in it")
    knn_samples: int | None = Field(50_000, ge=2, description="training images that they are among; none = all")


class MineSection(Section):
    """Stage mine: the neighbour graph (algorithms 3.b A3)."""

    k: int = Field(20, ge=1, le=255, description="neighbours of each image, itself not counted")
    layer: Literal["projector", "backbone"] = Field("projector", description="features that are compared")
    view: list[ViewOp] | None = Field(None, description="fixed view that the features are of; none = views.eval")
    factory: Name = Field("Flat", description="FAISS index; Flat is exact")
    num_probe: int | None = Field(None, ge=1, description="lists that an IVF index looks into")
    block: int = Field(4096, ge=1, description="queries per step and rank")


class ClusterSection(Section):
    """Stage cluster: SCAN, clustering by neighbours (algorithms 3.b B)."""

    epochs: int = Field(50, ge=1)
    batch_size: int = Field(128, ge=4, description="anchors per step and rank, one neighbour of each")
    view: list[ViewOp] = Field(description="random view of anchors and neighbours")
    optim: ClusterOptim = ClusterOptim()
    lambda_e: float = Field(5.0, ge=0, description="weight of the entropy of the mean prediction")
    num_heads: int = Field(1, ge=1, description="clusterings learnt side by side; the best of them is taken")
    head_only: bool = Field(False, description="keep the backbone as it is")
    holdout: float = Field(0.05, gt=0, lt=1, description="share of the images kept apart to choose the epoch")


class MixupMethod(Section):
    """Settings of method.name=mixup."""

    alpha: float = Field(1.0, gt=0, description="mixing weight ~ Beta(alpha, alpha)")


class DivideMixMethod(Section):
    """Settings of method.name=dividemix (symbols as in the paper; algorithms section 2)."""

    warmup_epochs: int = Field(10, ge=0, description="epochs of cross-entropy before the first split")
    warmup_penalty: bool = Field(False, description="add negative entropy in the warm-up (asymmetric or real noise)")
    tau: float = Field(0.5, gt=0, lt=1, description="labelled if the clean probability exceeds it")
    temperature: float = Field(0.5, gt=0, description="T of sharpening")
    alpha: float = Field(4.0, gt=0, description="mixing weight ~ Beta(alpha, alpha)")
    lambda_u: float = Field(25.0, ge=0, description="weight of the unlabelled loss (form=cifar)")
    rampup_epochs: float = Field(16.0, gt=0, description="epochs over which lambda_u grows from 0")
    form: Literal["cifar", "real"] = Field(
        "cifar", description="real: the published WebVision/Clothing1M form, labelled rows only, no unlabelled loss"
    )
    peers: Literal["sequential", "parallel"] = Field(
        "parallel", description="train against the updated peer, or against last epoch's"
    )
    subset: int | None = Field(
        None, ge=2, description="class-balanced samples drawn per network and epoch (Clothing1M); none = all"
    )


ViewName = Literal["weak", "strong", "by_noise"]


class ScanMixMethod(Section):
    """Settings of method.name=scanmix, beside those of method.dividemix (algorithms section 3)."""

    lambda_e: float = Field(5.0, ge=0, description="weight of the entropy of the mean prediction")
    batch_size: int = Field(128, ge=4, description="anchors per step, rank and network in the clustering pass")
    cluster_every: int | None = Field(
        1, ge=1, description="epochs between clustering passes; none = never, the paper's ablation"
    )
    anchors: int | None = Field(None, ge=2, description="anchors drawn afresh for a clustering pass; none = all images")
    include_self: bool = Field(True, description="count an image among its own neighbours, as the authors' code")
    noise_threshold: float = Field(0.6, ge=0, le=1, description="estimated noise rate above which noise is high")
    lr_low: float = Field(1e-5, gt=0, description="clustering learning rate at low noise")
    lr_high: float = Field(1e-3, gt=0, description="clustering learning rate at high noise")
    warmup_view: Literal["weak", "strong"] = Field("strong", description="weak is views.train, strong views.strong")
    ssl_view: ViewName = Field("by_noise", description="by_noise: strong where the estimated noise is high")
    cluster_view: ViewName = Field("by_noise", description="by_noise: strong where the estimated noise is high")


class MethodSection(Section):
    """Which method, and the settings of each."""

    name: Literal["cross_entropy", "mixup", "dividemix", "scanmix"] = "dividemix"
    mixup: MixupMethod = MixupMethod()
    dividemix: DivideMixMethod = DivideMixMethod()
    scanmix: ScanMixMethod = ScanMixMethod()
    mixture: MixtureSection = MixtureSection()


class DistSection(Section):
    """Ranks and devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(None, ge=1, description="CPU threads per rank; none = cores / local ranks")
    timeout_seconds: float = Field(1800.0, gt=0, description="longest wait in one collective before the run fails")
    interface: Name | None = Field(None, description="network interface of gloo and nccl; none = they choose")


class EngineSection(Section):
    """What trains the networks on all ranks together."""

    name: Literal["ddp", "deepspeed"] = Field("ddp", description="DistributedDataParallel, or DeepSpeed")
    zero_stage: int = Field(
        0, ge=0, le=3, description="divided over the ranks: 1 optimiser state, 2 also gradients, 3 also weights"
    )
    config: File | None = Field(None, description="JSON file of DeepSpeed's own settings, beside those that are ours")

    @model_validator(mode="after")
    def _check_name(self) -> "EngineSection":
        if self.name == "ddp" and (self.zero_stage or self.config is not None):
            setting = "zero_stage" if self.zero_stage else "config"
            raise ValueError(f"engine.{setting} is for DeepSpeed; set engine.name=deepspeed, or leave it out")
        return self


class TrackSection(Section):
    """MLflow, on top of the JSON lines that every run writes."""

    enabled: bool = Field(True, description="send metrics to MLflow")
    uri: Name | None = Field(None, description="MLflow store or server; none = mlflow.db beside the run directory")
    experiment: Name = "nldist"
    run_name: Name | None = Field(None, description="none = the run directory's name")
    system_metrics: bool = Field(True, description="CPU, memory and GPU use")
    every_seconds: float = Field(10.0, gt=0, description="interval of progress lines and step metrics")
    histogram_every: int = Field(5, ge=1, description="epochs between loss histograms")


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    data: DataSection
    views: ViewsSection
    model: ModelSection = ModelSection()
    optim: OptimSection = OptimSection()
    train: TrainSection
    method: MethodSection = MethodSection()
    pretext: PretextSection | None = Field(None, description="for methods that begin with self-supervision")
    mine: MineSection = MineSection()
    cluster: ClusterSection | None = Field(None, description="for methods that begin with clustering")
    dist: DistSection = DistSection()
    engine: EngineSection = EngineSection()
    track: TrackSection = TrackSection()

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        divide = self.method.dividemix
        if self.method.name == "scanmix":
            self._check_scanmix()
        if self.model.compile and self.engine.zero_stage == 3:
            raise ValueError("model.compile=true cannot be used with engine.zero_stage=3; leave one of them out")
        if self.method.name in ("dividemix", "scanmix") and divide.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"method.dividemix.warmup_epochs={divide.warmup_epochs} is more than "
                f"train.epochs={self.train.epochs}; lower it or train longer"
            )
        return self

    def _check_scanmix(self) -> None:
        for name, value in (
            ("pretext", self.pretext),
            ("cluster", self.cluster),
            ("views.strong", self.views.strong),
        ):
            if value is None:
                raise ValueError(f"method.name=scanmix needs {name}; see configs/clothing1m/scanmix.yaml")
        assert self.pretext is not None
        if self.pretext.epochs == 0 and self.model.pretrained is None:
            raise ValueError("pretext.epochs=0 keeps the backbone of model.pretrained; set that, or train the pretext")
        if self.pretext.epochs == 0 and self.mine.layer == "projector":
            raise ValueError("pretext.epochs=0 leaves the projector untrained; set mine.layer=backbone")
        if self.method.dividemix.warmup_epochs == 0:
            raise ValueError(
                "method.name=scanmix needs method.dividemix.warmup_epochs of 1 or more: until then the outputs are "
                "clusters, not classes"
            )
        if self.method.dividemix.subset is not None:
            raise ValueError("method.dividemix.subset is not for scanmix, which looks at every image; set it to null")

    def flat(self) -> dict[str, Any]:
        """All settings by dotted name, as plain values."""
        return dict(flatten(self.model_dump(mode="json")))

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested mappings with their dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
