"""The interface between solvers and operators, and the registry of solvers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .._moved import forward
from ..errors import ConfigurationError
from ..registry import Registry
from .solution import Solution

__all__ = ["SOLVERS", "LinearOperator", "SolveOptions", "Solver", "SolverRegistry"]


class LinearOperator(Protocol):
    """A real matrix ``A`` of shape ``(rows, cols)``, given by its products with vectors.

    Attributes:
        shape: The shape ``(rows, cols)``.
        dtype: The dtype of the vectors.
        device: The device of the vectors.
        products: The number of Hessian-vector products so far.
        examples: The number of examples in all these products together.

    If ``A`` is symmetric and positive semi-definite, the operator should have a true attribute
    ``positive_semidefinite``. Without it, no such property is assumed.
    """

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def products(self) -> int: ...
    @property
    def examples(self) -> int: ...

    def matvec(self, vectors: Tensor) -> Tensor:
        """``A V``: ``(cols,) → (rows,)``, or ``(cols, q) → (rows, q)`` for several at once."""

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """``Aᵀ V``: ``(rows,) → (cols,)``, or ``(rows, q) → (cols, q)`` for several at once."""


@dataclass(frozen=True)
class SolveOptions:
    """The options of a solve, the same for every solver.

    Attributes:
        damping: The damping ``λ ≥ 0``, which is added to the eigenvalues of a symmetric matrix ``C``, in their unit. If
            ``C`` is declared positive semi-definite, every solver solves ``(C + λ) x = g``. If the matrix is
            rectangular or not declared so, least-squares solvers minimise ``‖A x − g‖² + λ²‖x‖²``: an eigenvalue or
            singular value ``c`` then counts as ``√(c² + λ²)``.
        rtol: The relative residual at which the solve counts as converged; see
            :attr:`Solution.residual <lightning_gif.solvers.Solution>`.
        max_iter: The largest number of iterations. An iteration costs two products for least squares, and one for
            symmetric matrices. For a sketch, such as ``"nystrom"``, this is the rank.
        seed: Seed of all random draws.
        start: The first iterate, ``(cols,)`` or ``(cols, q)``; zero by default. Zero is also used if its residual is
            smaller than that of ``start``.
        discrepancy: The solve also stops if ``‖A x − g‖ ≤ discrepancy·‖g‖`` (Morozov's discrepancy principle).
    """

    damping: float = 0.0
    rtol: float = 1e-3
    max_iter: int = 100
    seed: int = 0
    start: Tensor | None = field(default=None, repr=False, compare=False)
    discrepancy: float = 0.0


Algorithm = Callable[..., "Solution | list[Solution]"]
"""``(operator, rhs, options) →`` a solution, or a list for columns. It may take further keywords of its own."""


class Solver:
    """An algorithm for linear systems, with a declaration of its requirements and of the options that it supports.

    It is called with an operator, a right-hand side and, as keywords, any of :class:`SolveOptions`. Unsupported
    operators and options raise an error before the solve starts.

    Args:
        name: The registered name.
        algorithm: ``(operator, rhs, options: SolveOptions) →`` a :class:`~lightning_gif.solvers.Solution`, or a list
            for columns.
        requires_symmetric_psd: Whether the matrix must be symmetric and positive semi-definite. Only the shape is
            checked here. If it is false, the solver accepts any matrix and solves in the least-squares sense.
        requires_damping: Whether the damping must be positive.
        requires_draws: Whether the operator must be able to draw batches, by a method ``draw(seed)``.
        shares_products_across_rhs: Whether the number of products does not depend on the number of right-hand sides,
            so that all of them should be solved together.
        is_sketch: Whether a low-rank approximation of rank ``max_iter`` replaces the matrix, so that all directions
            beyond it have the damping alone. For scores, weight decay is then added to the damping.
        supports_start: Whether the solver accepts a first iterate.
        supports_discrepancy: Whether the solver can stop at a discrepancy.
        max_iter: The default of :attr:`SolveOptions.max_iter`.

    Example:
        >>> from lightning_gif import SOLVERS
        >>> SOLVERS["cg"].requires_symmetric_psd, SOLVERS["lsmr"].requires_symmetric_psd
        (True, False)
    """

    def __init__(
        self,
        name: str,
        algorithm: Algorithm,
        *,
        requires_symmetric_psd: bool = False,
        requires_damping: bool = False,
        requires_draws: bool = False,
        shares_products_across_rhs: bool = False,
        is_sketch: bool = False,
        supports_start: bool = True,
        supports_discrepancy: bool = True,
        max_iter: int = SolveOptions.max_iter,
    ) -> None:
        self.name = name
        self.requires_symmetric_psd = requires_symmetric_psd
        self.requires_damping = requires_damping
        self.requires_draws = requires_draws
        self.shares_products_across_rhs = shares_products_across_rhs
        self.is_sketch = is_sketch
        self.supports_start = supports_start
        self.supports_discrepancy = supports_discrepancy
        self._algorithm, self._max_iter = algorithm, max_iter
        self.__doc__ = algorithm.__doc__
        self.__module__ = algorithm.__module__
        self.__name__ = self.__qualname__ = getattr(algorithm, "__name__", name)

    def __repr__(self) -> str:
        return f"Solver({self.name!r})"

    def with_options(self, name: str, **own: Any) -> Solver:
        """The same solver under another name, with other defaults of options that it alone has.

        Args:
            name: The name to register it under.
            **own: The options, such as ``repeats=4`` of ``"stochastic_lissa"``.

        Raises:
            ConfigurationError: For an option that every solver has, because each call gives those.
        """
        shared = sorted({one.name for one in fields(SolveOptions)}.intersection(own))
        if shared:
            raise ConfigurationError(
                f"The solver {name!r} binds {_enumerate(shared)}, which each call gives. Pass it to the call or to"
                " GIFCallback, or register a function that changes it."
            )
        other = copy.copy(self)
        other.name, other._algorithm = name, partial(self._algorithm, **own)
        return other

    def __call__(
        self,
        operator: LinearOperator,
        rhs: Tensor,
        *,
        damping: float = SolveOptions.damping,
        rtol: float = SolveOptions.rtol,
        max_iter: int | None = None,
        seed: int = SolveOptions.seed,
        start: Tensor | None = None,
        discrepancy: float = SolveOptions.discrepancy,
        **own: Any,
    ) -> Solution | list[Solution]:
        """Solves the system for one or several right-hand sides.

        Args:
            operator: The matrix ``A``, ``(rows, cols)``.
            rhs: The right-hand side ``g``, ``(rows,)``, or several as columns ``(rows, q)``.
            damping: The damping. :class:`SolveOptions` describes this option and the next five.
            rtol: The relative residual that counts as converged.
            max_iter: The largest number of iterations; by default that of the solver.
            seed: Seed of all random draws.
            start: The first iterate.
            discrepancy: The unexplained share at which the solve stops.
            **own: Options of this solver only.

        Returns:
            One solution if ``rhs`` is a vector ``(rows,)``; a list of ``q`` solutions if it has columns.

        Raises:
            ConfigurationError: If the solver does not support the operator or an option.
        """
        options = SolveOptions(
            damping, rtol, self._max_iter if max_iter is None else max_iter, seed, start, discrepancy
        )
        self._refuse_unsupported(operator, options)
        return self._algorithm(operator, rhs, options, **own)

    def _refuse_unsupported(self, operator: LinearOperator, options: SolveOptions) -> None:
        rows, cols = operator.shape
        expected: list[str] = []
        given: list[str] = []
        advice: list[str] = []
        for declared, requirement, fails, value, remedy in (
            (
                self.requires_symmetric_psd,
                "a square operator",
                rows != cols,
                f"an operator of shape {(rows, cols)}",
                "For method='gif', whose matrix has more rows than columns, use solver='lsmr'.",
            ),
            (not self.supports_start, "no start", options.start is not None, "a start", "Leave `start` out."),
            (
                not self.supports_discrepancy,
                "no `discrepancy`",
                options.discrepancy > 0,
                f"discrepancy={options.discrepancy}",
                "Leave `discrepancy` at 0, or use solver='lsmr', which supports it.",
            ),
            (
                self.requires_damping,
                "a `damping` above 0",
                not options.damping > 0,
                f"damping={options.damping}",
                "Omit `damping` to have it measured, or use solver='cg' or 'lsmr'.",
            ),
        ):
            if declared:
                expected.append(requirement)
                if fails:
                    given.append(value)
                    advice.append(remedy)
        if given:
            raise ConfigurationError(
                f"solver={self.name!r} takes {_enumerate(expected)}, got {_enumerate(given)}. {' '.join(advice)}"
            )
        if self.requires_draws and not hasattr(operator, "draw"):
            raise ConfigurationError(
                f"solver={self.name!r} needs an operator that can draw random batches with draw(seed), but"
                f" {type(operator).__name__} cannot. Use solver='lissa'."
            )


def _enumerate(parts: list[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


Function = TypeVar("Function", bound=Algorithm)


class SolverRegistry(Registry[Solver]):
    """The solvers by name.

    A plain function ``(operator, rhs, *, damping, rtol, max_iter, seed, discrepancy)`` can be registered directly. It
    is called with one right-hand side ``(rows,)`` at a time, and must accept any matrix and solve in the least-squares
    sense. Register a :class:`Solver` to declare requirements. Both kinds have to apply the damping themselves;
    :func:`~lightning_gif.solvers.operators.damped_system` helps with that. A ``functools.partial``
    of a :class:`Solver` with options that it alone has keeps what the solver declares.

    Example:
        >>> solvers = SolverRegistry("solver")
        >>> @solvers.register("patient lsmr")
        ... def patient(operator, rhs, *, max_iter, **options):
        ...     from lightning_gif.solvers import lsmr
        ...
        ...     return lsmr(operator, rhs, max_iter=10 * max_iter, **options)
        >>> solvers["patient lsmr"].requires_symmetric_psd
        False
    """

    def register(self, name: str) -> Callable[[Function], Function]:
        """Decorator that adds a :class:`Solver`, or a plain function with keywords, under ``name``.

        Raises:
            ConfigurationError: If the name is taken, or a ``functools.partial`` of a solver binds anything but options
                that this solver alone has.
        """

        def add(function: Function) -> Function:
            super(SolverRegistry, self).register(name)(_as_solver(name, function))
            return function

        return add


def _as_solver(name: str, function: Algorithm) -> Solver:
    if isinstance(function, Solver):
        return function
    if isinstance(function, partial) and isinstance(function.func, Solver):
        if function.args:
            raise ConfigurationError(
                f"The solver {name!r} binds its operator or right-hand side. Bind only options, as keywords."
            )
        return function.func.with_options(name, **function.keywords)
    return Solver(name, _with_keywords(function))


def _with_keywords(function: Algorithm) -> Algorithm:
    """An algorithm that calls a function for each right-hand side, with the options as keywords.

    ``start`` is passed only if it is given.
    """

    def algorithm(operator: LinearOperator, rhs: Tensor, options: SolveOptions, **own: Any) -> Any:
        keywords = {one.name: getattr(options, one.name) for one in fields(options)}
        if options.start is None:
            del keywords["start"]
        if rhs.ndim == 1:
            return function(operator, rhs, **keywords, **own)
        starts = [{}] * rhs.shape[1] if options.start is None else [{"start": one} for one in options.start.T]
        columns = zip(rhs.T, starts, strict=True)
        return [function(operator, column, **{**keywords, **start}, **own) for column, start in columns]

    algorithm.__doc__ = function.__doc__
    return algorithm


SOLVERS = SolverRegistry("solver")
"""All solvers by name; :meth:`SolverRegistry.register` adds one."""


def solver(name: str, **declared: Any) -> Callable[[Algorithm], Solver]:
    """Decorator that turns an algorithm into a registered :class:`Solver`.

    Args:
        name: The name to register it under.
        **declared: Its requirements and supported options, see :class:`Solver`.
    """

    def add(algorithm: Algorithm) -> Solver:
        return SOLVERS.register(name)(Solver(name, algorithm, **declared))

    return add


__getattr__ = forward(__name__)  # forwards moved names
