"""The methods, by name."""

from nldist.methods.co_teaching import CoTeaching
from nldist.methods.co_teaching_plus import CoTeachingPlus
from nldist.methods.cross_entropy import CrossEntropy
from nldist.methods.dividemix import DivideMix
from nldist.methods.elr import ELR
from nldist.methods.forward import Forward
from nldist.methods.lend import Lend
from nldist.methods.m_correction import MCorrection
from nldist.methods.mixnn import MixNN
from nldist.methods.mixup import Mixup
from nldist.methods.pencil import Pencil
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
    "elr": ELR,
    "co_teaching": CoTeaching,
    "co_teaching_plus": CoTeachingPlus,
    "forward": Forward,
    "pencil": Pencil,
    "m_correction": MCorrection,
}


def build_method(context: Context) -> Method:
    """The method that the configuration names."""
    return METHODS[context.config.method.name](context)
