"""The methods, by name."""

from nldist.methods.base import Method
from nldist.methods.context import Context
from nldist.methods.cross_entropy import CrossEntropy
from nldist.methods.dividemix import DivideMix
from nldist.methods.mixup import Mixup
from nldist.methods.scanmix import ScanMix

METHODS: dict[str, type[Method]] = {
    "cross_entropy": CrossEntropy,
    "mixup": Mixup,
    "dividemix": DivideMix,
    "scanmix": ScanMix,
}


def build_method(context: Context) -> Method:
    """The method that the configuration names."""
    return METHODS[context.config.method.name](context)
