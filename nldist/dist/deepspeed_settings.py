"""DeepSpeed's own configuration for a run: what follows from ours, and the user's JSON file."""

import json
from pathlib import Path
from typing import Any

from nldist.config import EngineSection, OptimSection
from nldist.errors import UserError

# Keys of DeepSpeed's configuration that a setting of ours decides.
_OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "optim.accumulate",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "fp16": "train.autocast",
    "bf16": "train.autocast",
    "bfloat16": "train.autocast",
    "amp": "train.autocast",
    "torch_autocast": "train.autocast",
}
_LARGEST_BUCKET = 50_000_000  # elements; DeepSpeed's default would take 2 GB for each network


def deepspeed_settings(engine: EngineSection, optim: OptimSection, num_parameters: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, for a network of so many parameters.

    Raises:
        UserError: engine.config cannot be read, or says what a setting of ours says.
    """
    own = read_own_settings(engine)
    zero = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": min(num_parameters, _LARGEST_BUCKET),
        **own.pop("zero_optimization", {}),
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number, and only reports it
        "gradient_accumulation_steps": optim.accumulate,
        "gradient_clipping": optim.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "zero_optimization": zero,
        **own,
    }


def read_own_settings(engine: EngineSection) -> dict[str, Any]:
    """The user's JSON file, checked against our settings; empty without one.

    Raises:
        UserError: see `deepspeed_settings`.
    """
    path = engine.config
    if path is None:
        return {}
    own = _read(path)
    for key, ours in _OURS.items():
        if key in own:
            raise UserError(f"engine.config {path}: leave out {key}, which {ours} of the run's configuration decides")
    zero = own.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"engine.config {path}: zero_optimization must be an object, not {zero!r}")
    if "stage" in zero:
        raise UserError(f"engine.config {path}: leave out zero_optimization.stage, which engine.zero_stage decides")
    if zero and engine.zero_stage == 0:
        raise UserError(f"engine.config {path} has zero_optimization, but engine.zero_stage=0; set 1 or 2")
    return own


def _read(path: Path) -> dict[str, Any]:
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"engine.config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"engine.config {path} is not valid JSON: {error}") from None
    if not isinstance(own, dict):
        raise UserError(f"engine.config {path} must hold an object of DeepSpeed's settings, not {own!r:.40}")
    return own
