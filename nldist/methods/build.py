"""The methods, by name."""

import importlib

from nldist.passes.context import Context
from nldist.passes.method import Method

METHODS = {
    "cross_entropy": "cross_entropy.CrossEntropy",
    "mixup": "mixup.Mixup",
    "dividemix": "dividemix.DivideMix",
    "scanmix": "scanmix.ScanMix",
    "lend": "lend.Lend",
    "mixnn": "mixnn.MixNN",
    "selc": "selc.SELC",
    "elr": "elr.ELR",
    "co_teaching": "co_teaching.CoTeaching",
    "co_teaching_plus": "co_teaching_plus.CoTeachingPlus",
    "forward": "forward.Forward",
    "pencil": "pencil.Pencil",
    "m_correction": "m_correction.MCorrection",
}


def method_class(name: str) -> type[Method]:
    """The method's class. Its module alone is imported: some need FAISS, for which a run of another should not wait."""
    module, kind = METHODS[name].split(".")
    found: type[Method] = getattr(importlib.import_module(f"nldist.methods.{module}"), kind)
    return found


def build_method(context: Context) -> Method:
    """The method that the configuration names."""
    return method_class(context.config.method.name)(context)
