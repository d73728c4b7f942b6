"""Solvers for linear systems with the curvature matrix. They are pure linear algebra and do not depend on models."""

from .base import SOLVERS, LinearOperator, SolveOptions, Solver, SolverRegistry
from .cgls import cgls
from .dense import dense, to_matrix
from .lissa import lissa, plain_lissa
from .lsmr import lsmr
from .nystrom import LowRank, low_rank, low_rank_eigenvectors, nystrom
from .solution import Solution, Status
from .spectrum import Spectrum, spectrum
from .stochastic import stochastic_lissa
from .symmetric import cg, truncated_newton
from .vectors import require_finite

__all__ = [
    "SOLVERS",
    "LinearOperator",
    "LowRank",
    "Solution",
    "SolveOptions",
    "Solver",
    "SolverRegistry",
    "Spectrum",
    "Status",
    "cg",
    "cgls",
    "dense",
    "lissa",
    "low_rank",
    "low_rank_eigenvectors",
    "lsmr",
    "nystrom",
    "plain_lissa",
    "require_finite",
    "spectrum",
    "stochastic_lissa",
    "to_matrix",
    "truncated_newton",
]
