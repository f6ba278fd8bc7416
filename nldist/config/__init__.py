"""The typed configuration of a run: one class per part, every field documented. `nldist.config.file` reads it."""

import difflib
from typing import Annotated, Any

import yaml
from pydantic import Field, model_validator

from nldist.config.marks import FREE, flat
from nldist.config.methods import (
    DivideMixMethod,
    LendMethod,
    MethodSection,
    MixNNMethod,
    MixtureSection,
    MixupMethod,
    ScanMixMethod,
    SELCMethod,
)
from nldist.config.recipe import Recipe
from nldist.config.run import (
    DataSection,
    DistSection,
    EngineSection,
    ModelSection,
    RunSection,
    TrackSection,
    ViewsSection,
)
from nldist.config.section import Name, Section
from nldist.config.stages import ClusterOptim, ClusterSection, MineSection, PretextOptim, PretextSection
from nldist.config.training import OptimSection, TrainSection
from nldist.data.views import ViewOp

# Also what the classes of queued jobs of nldist 0.1 are called.
__all__ = [
    "ClusterOptim",
    "ClusterSection",
    "Config",
    "DataSection",
    "DistSection",
    "DivideMixMethod",
    "EngineSection",
    "LendMethod",
    "MethodSection",
    "MineSection",
    "MixNNMethod",
    "MixtureSection",
    "MixupMethod",
    "ModelSection",
    "Name",
    "OptimSection",
    "PretextOptim",
    "PretextSection",
    "Recipe",
    "RunSection",
    "SELCMethod",
    "ScanMixMethod",
    "Section",
    "TrackSection",
    "TrainSection",
    "ViewsSection",
]


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
    dist: Annotated[DistSection, FREE] = DistSection()
    engine: Annotated[EngineSection, FREE] = EngineSection()
    track: Annotated[TrackSection, FREE] = TrackSection()

    @model_validator(mode="after")
    def _check_views(self) -> "Config":
        sections = {"pretext": self.pretext, "mine": self.mine, "cluster": self.cluster}
        for name, section in sections.items():
            if section is not None and isinstance(section.view, str):
                self._check_view(f"{name}.view", section.view)
        sanm = self.method.sanm
        if self.method.ssl == "sanm":
            needed = ("guess_view", "pair_view", "strong_view")
            for name in needed if self.method.dividemix.form == "cifar" else needed[:1]:
                self._check_view(f"method.sanm.{name}", getattr(sanm, name))
        return self

    def _check_view(self, setting: str, name: str) -> None:
        views = self.views.by_name()
        if name not in views:
            near = difflib.get_close_matches(name, views, n=1)
            more = f"did you mean {near[0]}?" if near else f"there are {', '.join(views)}"
            raise ValueError(f"{setting}={name}, but views has no {name}; {more}")

    def view(self, choice: str | list[ViewOp]) -> list[ViewOp]:
        """The operations of a view that is named or spelt out."""
        return self.views.by_name()[choice] if isinstance(choice, str) else choice

    @model_validator(mode="after")
    def _check_together(self) -> "Config":
        divide = self.method.dividemix
        if self.method.ssl != "mixmatch" and self.method.name not in ("dividemix", "scanmix"):
            raise ValueError(f"method.ssl={self.method.ssl} is for dividemix and scanmix, not {self.method.name}")
        if self.method.name == "scanmix":
            self._check_scanmix()
        if self.method.name in ("dividemix", "scanmix") and divide.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"method.dividemix.warmup_epochs={divide.warmup_epochs} is more than "
                f"train.epochs={self.train.epochs}; lower it or train longer"
            )
        self._check_turning()
        self._check_lengths()
        return self

    def _check_turning(self) -> None:
        """Soft labels need an epoch after es."""
        turning = {"mixnn": self.method.mixnn.turning_epoch, "selc": self.method.selc.turning_epoch}
        name = self.method.name
        if (es := turning.get(name, 0)) >= self.train.epochs:
            raise ValueError(
                f"method.{name}.turning_epoch={es} leaves none of train.epochs={self.train.epochs}; "
                "lower it or train longer"
            )
        if name == "mixnn" and (warmup := self.method.mixnn.warmup_epochs) > es:
            raise ValueError(f"method.mixnn.warmup_epochs={warmup} is more than turning_epoch={es}; lower it")

    def _check_lengths(self) -> None:
        """train.epochs must have room for the other phases of a baseline."""
        method, lengths = self.method, ("warmup_epochs", "correction_epochs", "estimate_epochs")
        if method.name in ("co_teaching_plus", "pencil", "m_correction", "forward"):
            settings = getattr(method, method.name).model_dump()
            given = {name: settings[name] for name in lengths if name in settings}
            if settings.get("transition") is None and sum(given.values()) > self.train.epochs:
                told = " and ".join(f"method.{method.name}.{name}={value}" for name, value in given.items())
                raise ValueError(f"{told} is more than train.epochs={self.train.epochs}; lower it or train longer")

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
        for name in ("subset", "warmup_subset"):
            if getattr(self.method.dividemix, name) is not None:
                raise ValueError(
                    f"method.dividemix.{name} is not for scanmix, which looks at every image; leave it out"
                )

    @property
    def recipe(self) -> Recipe:
        """How the training itself trains, after the stages before it."""
        train, views = self.train, self.views
        return Recipe(train.epochs, train.batch_size, self.optim, views.train, views.eval, train.ema_decay)

    def flat(self) -> dict[str, Any]:
        """All settings by dotted name, as plain values."""
        return flat(self)

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
