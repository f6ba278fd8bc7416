"""The run, its data, its network, and where it runs."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from nldist.config.marks import FREE
from nldist.config.section import File, Name, Section
from nldist.data.views import ViewOp


class RunSection(Section):
    """Where the run keeps its files, and its randomness."""

    dir: Annotated[File, FREE] = Field(
        Path("runs/unnamed"), description="run directory: checkpoints, metrics, plots, summary"
    )
    stages_dir: Annotated[File | None, FREE] = Field(
        None, description="where earlier stages keep their products, for several runs to share; none = in run.dir"
    )
    seed: int = Field(0, ge=0, description="every random decision of the run follows from it")


def _whole_window(value: Any) -> Any:
    return None if value == "whole" else value


class DataSection(Section):
    """The data set on disk and how it is read."""

    root: Annotated[File, FREE] = Field(description="data set directory made by tools/shard.py (holds dataset.json)")
    train_split: Name = Field("train", description="split to train on")
    eval_split: Name = Field(
        "test", description="split that accuracy is measured on after every epoch, which chooses weights/best.pt"
    )
    test_split: Annotated[Name | None, FREE] = Field(
        None, description="split that is measured, too, and chooses nothing; at the end with weights/best.pt once more"
    )
    label_set: Name | None = Field(None, description="labels to train with; none = the labels in the shards")
    labels_dir: Annotated[File | None, FREE] = Field(
        None,
        description="directory of further label sets, where the data set is read-only (nldist noise --labels-dir)",
    )
    clean_label_set: Name = Field("clean", description="true labels, where known: only used to measure the split")
    mean: tuple[float, float, float] = Field((0.5, 0.5, 0.5), description="RGB mean in [0, 1]")
    std: tuple[float, float, float] = Field((0.25, 0.25, 0.25), description="RGB standard deviation in [0, 1]")
    num_workers: Annotated[int, FREE] = Field(
        2, ge=0, description="reading and decoding processes per rank; 0 = in the rank itself"
    )
    window: Annotated[int | None, BeforeValidator(_whole_window)] = Field(
        16384, description="records shuffled together, so that reads stay sequential; 'whole' = all of a rank's"
    )
    on_bad: Literal["skip", "refuse"] = Field("skip", description="what to do with a record that cannot be decoded")
    max_side: int = Field(512, ge=8, description="images with a longer side (pixels) are shrunk when decoded")
    cache_dir: Annotated[File | None, FREE] = Field(
        None, description="node-local directory for copies of remote shards"
    )
    cache_gib: Annotated[float, FREE] = Field(100.0, gt=0, description="size limit of cache_dir in GiB")
    decoded_cache_gib: Annotated[float, FREE] = Field(
        0.0,
        ge=0,
        description="splits whose decoded images fit so many GiB are decoded once, and kept in cache_dir or /tmp",
    )

    @model_validator(mode="after")
    def _check_test_split(self) -> "DataSection":
        if self.test_split is not None and self.test_split == self.eval_split:
            raise ValueError(f"test_split={self.test_split} chooses weights/best.pt: it is eval_split, too; change one")
        return self


class ViewsSection(Section):
    """Augmentations by name, as lists of operations (see nldist.data.views). Further ones may have any name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, list[ViewOp]] = Field(init=False)
    train: list[ViewOp] = Field(description="random view for training")
    strong: list[ViewOp] | None = Field(None, description="strong random view (ScanMix)")
    eval: list[ViewOp] = Field(description="fixed view for sweeps and evaluation")

    def by_name(self) -> dict[str, list[ViewOp]]:
        """The views that there are."""
        views = {"train": self.train, "strong": self.strong, "eval": self.eval} | self.__pydantic_extra__
        return {name: view for name, view in views.items() if view is not None}


class ModelSection(Section):
    """The network."""

    name: Name = Field("preact_resnet18", description="one of nldist.models or any timm model")
    pretrained: File | None = Field(None, description="file of backbone weights (.pt, .safetensors) to start from")
    channels_last: bool = Field(True, description="memory format of weights and images")
    compile: bool = Field(False, description="torch.compile the network")


class DistSection(Section):
    """Ranks and devices."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(
        None, ge=1, description="CPU threads per rank; none = OMP_NUM_THREADS (not on Slurm), or cores / local ranks"
    )
    timeout_seconds: float = Field(1800.0, gt=0, description="longest wait in one collective before the run fails")
    interface: Name | None = Field(None, description="network interface of gloo and nccl; none = they choose")


class EngineSection(Section):
    """What trains the networks on all ranks together."""

    name: Literal["ddp", "deepspeed"] = Field("ddp", description="DistributedDataParallel, or DeepSpeed")
    zero_stage: int = Field(0, ge=0, le=2, description="divided over the ranks: 1 optimiser state, 2 also gradients")
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
    parent: Name | None = Field(None, description="tag nldist.job of the MLflow run that this one is nested under")
    system_metrics: bool = Field(True, description="CPU, memory and GPU use")
    every_seconds: float = Field(10.0, gt=0, description="interval of progress lines and step metrics")
    histogram_every: int = Field(5, ge=1, description="epochs between loss histograms")
