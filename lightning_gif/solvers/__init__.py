"""LiSSA and its peers. Pure linear algebra: nothing here knows that a model exists."""

from .base import SOLVERS, LinearOperator, Solver
from .cgls import cgls
from .dense import dense, to_matrix
from .lissa import lissa, plain_lissa
from .lsmr import lsmr
from .nystrom import LowRank, low_rank, nystrom
from .run import require_finite
from .solution import Solution, Status
from .spectrum import Spectrum, spectrum
from .stochastic import stochastic_lissa
from .symmetric import cg, truncated_newton

__all__ = [
    "SOLVERS",
    "LinearOperator",
    "LowRank",
    "Solution",
    "Solver",
    "Spectrum",
    "Status",
    "cg",
    "cgls",
    "dense",
    "lissa",
    "low_rank",
    "lsmr",
    "nystrom",
    "plain_lissa",
    "require_finite",
    "spectrum",
    "stochastic_lissa",
    "to_matrix",
    "truncated_newton",
]
