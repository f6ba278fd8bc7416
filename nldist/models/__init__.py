"""Backbones by name, and the classifier that is built on one."""

from nldist.models.build import build_model, check_revision, model_names, model_revision
from nldist.models.classifier import Classifier

__all__ = ["Classifier", "build_model", "check_revision", "model_names", "model_revision"]
