"""Networks by name: a backbone and named heads."""

from nldist.models.build import build_model, check_revision, model_names, model_revision
from nldist.models.network import Network

__all__ = ["Network", "build_model", "check_revision", "model_names", "model_revision"]
