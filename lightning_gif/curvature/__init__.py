"""The curvature of the training loss: its products with vectors, the influence methods, and inverses.

Modules that register inverses in :data:`INVERSES` are imported here, so that their names are known to users.
"""

from .._moved import forward
from .by_solver import DenseInverse, SketchInverse, SolverInverse
from .corrected import CorrectedEKFAC, LissaEKFAC, LsmrEKFAC
from .ekfac import EKFACInverse
from .inverse import INVERSES, InverseCurvature

__all__ = [
    "INVERSES",
    "CorrectedEKFAC",
    "DenseInverse",
    "EKFACInverse",
    "InverseCurvature",
    "LissaEKFAC",
    "LsmrEKFAC",
    "SketchInverse",
    "SolverInverse",
]

__getattr__ = forward(__name__)
