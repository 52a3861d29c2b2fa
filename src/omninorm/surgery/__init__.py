"""Surgery on models: identify norms by probing, then replace, fold or center them, with verification and undo."""

from omninorm.layers.identify import Identity, Refusal, identify
from omninorm.surgery.cancel import cancel_norms
from omninorm.surgery.center import center
from omninorm.surgery.difference.first import first_difference
from omninorm.surgery.difference.result import FirstDifference, ModuleDifference
from omninorm.surgery.fold import fold_gains
from omninorm.surgery.maps import MappedNorm, NormMap, norm_map
from omninorm.surgery.report import Report, Surgery
from omninorm.surgery.rotate import rotate
from omninorm.surgery.swap import SwapReport, swap_norms, swapped
from omninorm.surgery.verify import Verification, verify

__all__ = [
    "FirstDifference",
    "Identity",
    "MappedNorm",
    "ModuleDifference",
    "NormMap",
    "Refusal",
    "Report",
    "Surgery",
    "SwapReport",
    "Verification",
    "cancel_norms",
    "center",
    "first_difference",
    "fold_gains",
    "identify",
    "norm_map",
    "rotate",
    "swap_norms",
    "swapped",
    "verify",
]
