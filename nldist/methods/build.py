"""The methods, by name."""

from nldist.methods.cross_entropy import CrossEntropy
from nldist.methods.dividemix import DivideMix
from nldist.methods.lend import Lend
from nldist.methods.mixnn import MixNN
from nldist.methods.mixup import Mixup
from nldist.methods.scanmix import ScanMix
from nldist.methods.selc import SELC
from nldist.passes.context import Context
from nldist.passes.method import Method

METHODS: dict[str, type[Method]] = {
    "cross_entropy": CrossEntropy,
    "mixup": Mixup,
    "dividemix": DivideMix,
    "scanmix": ScanMix,
    "lend": Lend,
    "mixnn": MixNN,
    "selc": SELC,
}


def build_method(context: Context) -> Method:
    """The method that the configuration names."""
    return METHODS[context.config.method.name](context)
