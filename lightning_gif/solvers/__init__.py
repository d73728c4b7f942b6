"""LiSSA and its peers. Pure linear algebra: nothing here knows that a model exists."""

from .base import SOLVERS, LinearOperator, Solution, Solver, Status, largest_singular_value
from .dense import dense, to_matrix
from .lissa import lissa

__all__ = [
    "SOLVERS",
    "LinearOperator",
    "Solution",
    "Solver",
    "Status",
    "dense",
    "largest_singular_value",
    "lissa",
    "to_matrix",
]
