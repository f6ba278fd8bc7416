"""How a network is trained."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from nldist.config.marks import FREE, LATER
from nldist.config.section import Section

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
    schedule: Literal["step", "cosine", "linear"] = Field(
        "step",
        description="step: times gamma at each milestone; cosine: towards min_lr, once per epoch; linear: so, from the "
        "first milestone on",
    )
    milestones: list[int] = Field([], description="epochs at which schedule=step multiplies the rate by gamma")
    gamma: float = Field(0.1, gt=0, le=1)
    min_lr: float = Field(0.0, ge=0, description="end of schedule=cosine and linear")
    restart_epochs: Annotated[int | None, LATER] = Field(
        None, ge=1, description="schedule=cosine begins anew each time after so many epochs; none = it does not"
    )
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear increase from 0 at the start")
    clip_norm: float | None = Field(None, gt=0, description="largest allowed norm of the gradient")
    accumulate: int = Field(1, ge=1, description="batches per optimiser step")

    @model_validator(mode="after")
    def _check_restarts(self) -> "OptimSection":
        if self.restart_epochs is not None and self.schedule != "cosine":
            raise ValueError("restart_epochs is for schedule=cosine; set that, or leave it out")
        return self


def _off(value: Any) -> Any:
    """An unquoted off is false in YAML."""
    return "off" if value is False else value


class TrainSection(Section):
    """Length, batches, precision and checkpoints."""

    epochs: int = Field(ge=1, description="epochs in all, warm-up included")
    batch_size: int = Field(
        128, ge=4, description="samples per step, rank and network; DivideMix: half labelled, half unlabelled"
    )
    eval_batch_size: int = Field(512, ge=1, description="samples per step and rank in sweeps and evaluation")
    autocast: Annotated[Literal["off", "bf16"], BeforeValidator(_off)] = Field(
        "off", description="precision of the forward and backward pass"
    )
    best: Literal["together", "each"] = Field(
        "together",
        description="weights/best.pt holds the networks of the epoch that is best for all together, or each network "
        "of its own best epoch",
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="evaluate averaged weights with this decay per step")
    checkpoint_every_steps: Annotated[int, FREE] = Field(
        1000, ge=0, description="also within an epoch; 0 = at epoch ends only"
    )
    keep_checkpoints: Annotated[int, FREE] = Field(2, ge=1, description="newest checkpoints that are kept")
