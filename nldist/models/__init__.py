"""Backbones by name, and the classifier that is built on one."""

from nldist.models.build import build_model, model_names
from nldist.models.classifier import Classifier

__all__ = ["Classifier", "build_model", "model_names"]
