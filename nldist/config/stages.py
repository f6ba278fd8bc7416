"""The stages before the training."""

from typing import Annotated, Literal

from pydantic import Field

from nldist.config.marks import FREE, LATER
from nldist.config.section import Name, Section, ViewChoice
from nldist.config.training import Optimizer, OptimSection


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
    """Stage pretext: self-supervised training of the backbone (docs/scanmix.md)."""

    name: Literal["simclr", "moco"] = "simclr"
    epochs: int = Field(500, ge=0, description="0 = keep the backbone of model.pretrained")
    batch_size: int = Field(512, ge=4, description="images per step and rank, two views of each")
    view: ViewChoice = Field(description="random view, drawn twice for each image")
    optim: PretextOptim = PretextOptim()
    dim: int = Field(128, ge=2, description="features of the projector")
    temperature: float = Field(0.1, gt=0)
    momentum: float = Field(0.999, ge=0, lt=1, description="of MoCo's momentum encoder, per step")
    queue: int = Field(65536, ge=4, description="past keys that MoCo compares with")
    knn_every: Annotated[int, FREE] = Field(10, ge=1, description="epochs between measurements of the k-NN accuracy")
    knn_k: Annotated[int, FREE] = Field(20, ge=1, le=256, description="neighbours that vote in it")
    knn_samples: Annotated[int | None, FREE] = Field(
        50_000, ge=2, description="training images that they are among; none = all"
    )


class MineSection(Section):
    """Stage mine: the neighbour graph (ScanMix, section 3.2)."""

    k: int = Field(20, ge=1, le=255, description="neighbours of each image, itself not counted")
    layer: Literal["projector", "backbone"] = Field("projector", description="features that are compared")
    view: Annotated[ViewChoice | None, LATER] = Field(
        None, description="fixed view that the features are of; none = views.eval"
    )
    factory: Name = Field("Flat", description="FAISS index; Flat is exact")
    num_probe: int | None = Field(None, ge=1, description="lists that an IVF index looks into")
    block: Annotated[int, FREE] = Field(
        4096, ge=1, description="queries per step and rank, of an approximate index or on a GPU"
    )


class ClusterSection(Section):
    """Stage cluster: SCAN, clustering by neighbours (docs/scanmix.md)."""

    epochs: int = Field(50, ge=1)
    batch_size: int = Field(128, ge=4, description="anchors per step and rank, one neighbour of each")
    view: ViewChoice = Field(description="random view of anchors and neighbours")
    optim: ClusterOptim = ClusterOptim()
    lambda_e: float = Field(5.0, ge=0, description="weight of the entropy of the mean prediction")
    num_heads: int = Field(1, ge=1, description="clusterings learnt side by side; the best of them is taken")
    head_only: bool = Field(False, description="keep the backbone as it is")
    holdout: float = Field(0.05, gt=0, lt=1, description="share of the images kept apart to choose the epoch")
