"""What can be chosen, checked once: the arguments that the callback and each call share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import psutil
import torch
from torch import Tensor

from ._compat import rank_zero_warn
from ._version import __version__
from .curvature.methods import METHODS
from .curvature.products import CURVATURES, Losses
from .curvature.sampling import SAMPLERS
from .curvature.streaming import Curvature
from .data.examples import Examples
from .distributed import ProcessGroup
from .errors import ConfigurationError, ConvergenceError, ConvergenceWarning
from .objective.objective import Objective
from .registry import nearest
from .selection import check_selector, is_name
from .solvers import (
    SOLVERS,
    LinearOperator,
    Solution,
    Status,
    low_rank,
    require_finite,
    spectrum,
    to_matrix,
    truncated_newton,
)
from .solvers.vectors import norms
from .storage.digests import Fingerprint

__all__ = ["Overrides", "Settings"]


# What is chosen for the one who does not choose, see benchmarks/README.md.
AUTO = "auto"

# Where scores by a least-squares solve stop to change much.
_INFLUENCE_RTOL = 1e-3

# How many examples give the curvature. Where a class is forgotten fewer do: steps are measured on others.
_EXAMPLES, _EXAMPLES_WITHOUT_A_CLASS = 2048, 1024

# Steps of conjugate gradients for scores: more follow the noise of the curvature's sample.
_STEPS_FOR_SCORES = 20

# Results smaller than this many bytes are kept in memory, however little of it is free.
_ALWAYS_IN_MEMORY = 2**26

# Up to how many parameters a matrix is formed and solved with.
_EXACT = 1024

# From how many queries on they share a sketch, its rank, and the least that is worth it.
_MANY = 13

_RANK, _LEAST_RANK = 512, 64

# The rank of one that examples are scored for themselves by: more of it does not find more wrong labels.
_RANK_FOR_ITSELF = 64

# How many steps a solve takes, and the most that it takes towards a residual.
_STEPS, _MOST_STEPS = 10, 200

# How many one takes that is followed by others at the weights it leads to. Where a class is forgotten more steps led to
# no better weights; where labels are corrected they did.
_STEPS_OF_MANY, _STEPS_FOR_LABELS = 5, 8

# Where a number of steps is asked for and no residual, those that float32 can still tell from rounding.
_LEAST_RTOL = 1e-4


class Overrides(TypedDict, total=False):
    """Settings that one call may change; see :class:`~lightning_gif.GIFCallback` for their meaning."""

    selector: str | Sequence[str]
    ratio: float
    method: str
    solver: str
    damping: float | None
    max_iter: int | None
    rtol: float | None
    discrepancy: float
    curvature: str
    curvature_examples: int | Literal["auto"] | None
    curvature_sampling: str
    weight_decay: float
    eigenvalues: int
    batch_size: int
    memory: float | None
    double: bool
    unconverged: Literal["warn", "raise", "ignore"]
    seed: int


@dataclass(frozen=True)
class Settings:
    """The checked arguments of :class:`~lightning_gif.GIFCallback`, which documents each.

    Raises:
        ConfigurationError: For a value out of range or an unknown name.
    """

    selector: str | Sequence[str]
    ratio: float
    method: str
    solver: str
    damping: float | None
    max_iter: int | None
    rtol: float | None
    discrepancy: float
    curvature: str
    curvature_examples: int | Literal["auto"] | None
    curvature_sampling: str
    weight_decay: float
    eigenvalues: int
    batch_size: int
    memory: float | None
    double: bool
    unconverged: str
    seed: int

    def __post_init__(self) -> None:
        check_selector(self.selector, self.ratio)
        for registry, name in ((METHODS, self.method), (SOLVERS, self.solver), (CURVATURES, self.curvature)):
            if name != AUTO:
                registry[name]
        SAMPLERS[self.curvature_sampling]
        number = (int, float)
        at_least_0 = "a number of at least 0"
        if self.damping is not None:
            _require("damping", self.damping, number, lambda value: 0 <= value < math.inf, f"None or {at_least_0}")
        _require("weight_decay", self.weight_decay, number, lambda value: 0 <= value < math.inf, at_least_0)
        _require("discrepancy", self.discrepancy, number, lambda value: 0 <= value < 1, "a number from 0 to below 1")
        _require("eigenvalues", self.eigenvalues, int, lambda value: value >= 0, "a whole number of at least 0")
        if self.memory is not None:
            _require("memory", self.memory, number, lambda value: 0 <= value < math.inf, f"None or {at_least_0} (GiB)")
        if not isinstance(self.double, bool):
            raise ConfigurationError(f"`double` must be True or False, got {self.double!r}.")
        if self.max_iter is not None:
            expected = "None or a whole number of at least 1"
            _require("max_iter", self.max_iter, int, lambda value: value >= 1, expected)
        if self.rtol is not None:
            _require("rtol", self.rtol, number, lambda value: 0 < value < 1, "None or a number between 0 and 1")
        _require("batch_size", self.batch_size, int, lambda value: value >= 1, "a whole number of at least 1")
        _require("seed", self.seed, int, lambda value: value >= 0, "a whole number of at least 0")
        if self.curvature_examples not in (None, AUTO):
            expected = "'auto', None (all) or a whole number of at least 1"
            _require("curvature_examples", self.curvature_examples, int, lambda value: value >= 1, expected)
        if self.unconverged not in ("warn", "raise", "ignore"):
            raise ConfigurationError(f"`unconverged` must be 'warn', 'raise' or 'ignore', got {self.unconverged!r}.")

    @property
    def needs_no_cache(self) -> bool:
        """Whether the targets are the same whatever training has shown."""
        whole = self.method != AUTO and not METHODS[self.method].selects
        return not is_name(self.selector) or self.selector == "random" or whole

    def override(self, changes: Overrides, named: Iterable[str] = ()) -> Settings:
        """The same settings with some changed for one call.

        Args:
            changes: The new values.
            named: What else the call takes, which may be what was meant.

        Raises:
            ConfigurationError: For an unknown name or a bad value.
        """
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigurationError(f"Unknown argument {name!r}. {nearest(name, {*known, *named})}")
        return replace(self, **changes)

    def fingerprint(self) -> Fingerprint:
        """Those that results depend on, and the versions of what computes them."""
        chosen = {name: str(value) for name, value in asdict(self).items() if name not in ("memory", "unconverged")}
        return {**chosen, "the version of PyTorch": torch.__version__, "that of lightning_gif": __version__}

    def for_unlearning(self) -> Settings:
        """The same with what was left open chosen for edits, but what differs between their solves.

        That is the curvature, see :meth:`for_one_of_many`, and the damping: 0 in :meth:`solve`, and measured in
        :meth:`solve_damped`.
        """
        return replace(self, method=_chosen(self.method, "gif"), solver=_chosen(self.solver, "lsmr"))

    def for_influence(
        self, *, ggn: bool, on_targets: bool, queries: int = 1, rank: int = 0, itself: bool = False
    ) -> Settings:
        """The same with what was left open chosen for scores; damping stays open where it is to be measured.

        Args:
            ggn: Whether the objective has a Gauss–Newton matrix.
            on_targets: Whether only target parameters are to be looked at.
            queries: How many right-hand sides there are.
            rank: Of a sketch of the curvature, the most that there is memory for.
            itself: Whether each example is scored for itself.
        """
        method = _chosen(self.method, "fif" if on_targets else "if")
        square = METHODS[method].rows == METHODS[method].cols
        curvature = _chosen(self.curvature, "ggn" if square and ggn else "hessian")
        # Where all queries together would take more products than a sketch that is as good.
        shares = min(rank, _RANK, queries * _STEPS_FOR_SCORES) if self.max_iter is None else min(rank, self.max_iter)
        shared = shares >= _LEAST_RANK and queries >= _MANY and self.rtol is None and not self.discrepancy
        symmetric = "nystrom" if shared else "cg"
        solver = _chosen(self.solver, symmetric if square and curvature == "ggn" else "lsmr")
        chosen = replace(self, method=method, curvature=curvature, solver=solver)
        if not square:  # the plain least squares of GIF, to the end
            rtol = _INFLUENCE_RTOL if self.rtol is None else self.rtol
            return replace(chosen, damping=0.0 if self.damping is None else self.damping, rtol=rtol)
        if itself:  # by a sketch, whatever solves for queries
            return replace(chosen, max_iter=self.max_iter or min(rank or _RANK_FOR_ITSELF, _RANK_FOR_ITSELF))
        if self.max_iter is None and self.rtol is None and solver in ("cg", "nystrom"):
            return replace(chosen, max_iter=_STEPS_FOR_SCORES if solver == "cg" else shares or _RANK)
        return chosen

    def for_relinearised_step(self, *, labels: bool, convex: bool) -> Settings:
        """The same for a solve that is followed by others where it leads to, if nothing else is asked for.

        Args:
            labels: Whether it corrects labels.
            convex: Whether its curvature is better one without negative eigenvalues, if it is left open.
        """
        chosen = replace(self, curvature=_chosen(self.curvature, "ggn" if convex else "hessian"))
        steps = _STEPS_FOR_LABELS if labels else _STEPS_OF_MANY
        return replace(chosen, max_iter=steps) if self.max_iter is None and self.rtol is None else chosen

    def sample_size(self, *, without_a_class: bool = False) -> int | None:
        """Over how many examples the curvature is taken, at most; ``None`` for all.

        Args:
            without_a_class: Whether it is that of the examples that stay where a class is forgotten.
        """
        if isinstance(self.curvature_examples, str):
            return _EXAMPLES_WITHOUT_A_CLASS if without_a_class else _EXAMPLES
        return self.curvature_examples

    def bytes_to_keep(self, objective: Objective) -> float:
        """How many bytes of batches, and again of passes, a process may keep between products.

        Half of ``memory`` each; of a quarter of what is free, where that is ``None``: of this process's share of it,
        and no more than all other processes may.
        """
        return self._share(objective.device, objective.processes)

    def _share(self, device: torch.device, processes: ProcessGroup) -> float:
        if self.memory is not None:
            return self.memory * 2**30 / 2
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory() / processes.here
        return min(processes.gather(free)) / 4 / 2

    def is_large(self, size: float, processes: ProcessGroup) -> bool:
        """Whether ``size`` bytes of results should be in a file rather than in the CPU's memory."""
        return size > max(self._share(torch.device("cpu"), processes), _ALWAYS_IN_MEMORY)

    def open_curvature(
        self,
        objective: Objective,
        examples: Examples,
        theta: Tensor | None = None,
        *,
        losses: Losses | None = None,
        weight_decay: float | None = None,
        keep: bool = True,
        on_product: Callable[[], Any] = lambda: None,
    ) -> Curvature:
        """The curvature of the loss over examples.

        Args:
            objective: Whose loss.
            examples: Over which data.
            theta: Where, ``(p,)``; by default at the present parameters.
            losses: Another function of the examples.
            weight_decay: Another than that of the settings.
            keep: Keep passes between products, within ``memory``.
            on_product: Called at each product.
        """
        return Curvature(
            CURVATURES[_chosen(self.curvature, "hessian")](losses or objective),
            objective.theta if theta is None else theta,
            examples,
            weight_decay=float(self.weight_decay if weight_decay is None else weight_decay),
            memory=self.bytes_to_keep(objective) if keep else 0.0,
            on_product=on_product,
        )

    def describe(self, curvature: Curvature) -> dict[str, Any]:
        """How the products were made, and the ends of the spectrum if these were asked for, in plain numbers."""
        ends: dict[str, Any] = {}
        if self.eigenvalues:
            ends = asdict(spectrum(curvature, self.eigenvalues, seed=self.seed))
        return {"kind": _chosen(self.curvature, "hessian"), **curvature.summary(), **ends}

    @property
    def _most_steps(self) -> int:
        return self.max_iter or (_STEPS if self.rtol is None else _MOST_STEPS)

    @property
    def _least_residual(self) -> float:
        return _LEAST_RTOL if self.rtol is None else self.rtol

    def newton(self, operator: LinearOperator, rhs: Tensor, relative: float) -> tuple[Solution, float]:
        """A damped Newton step of as many steps as a solve takes, see :func:`~.solvers.truncated_newton`.

        Args:
            operator: ``C``, ``(n, n)``, symmetric.
            rhs: ``(n,)``.
            relative: Damping, beside that of the settings.

        Raises:
            ConvergenceError: See :meth:`solve`.
            NonFiniteError: If it met a non-finite number.
        """
        solution, bend = truncated_newton(
            operator,
            rhs,
            damping=float(self.damping or 0.0),
            relative=relative,
            rtol=self._least_residual,
            max_iter=self._most_steps,
        )
        self.warn_unconverged([solution])
        return solution, bend

    def solve(self, operator: LinearOperator, rhs: Tensor) -> list[Solution]:
        """Runs the chosen solver.

        Args:
            operator: ``B``, ``(rows, cols)``.
            rhs: ``(rows,)``, or several as columns ``(rows, q)``.

        Returns:
            A solution for each right-hand side. Without an ``rtol``, a number of steps is all that was asked for.

        Raises:
            ConvergenceError: If it did not converge and ``unconverged="raise"``, or if it diverged.
            NonFiniteError: If it met a non-finite number.
        """
        found = SOLVERS[self.solver](
            operator,
            rhs,
            damping=float(self.damping or 0.0),
            rtol=self._least_residual,
            max_iter=self._most_steps,
            seed=self.seed,
            discrepancy=self.discrepancy,
        )
        solutions = found if isinstance(found, list) else [found]
        expected = (operator.shape[1],)
        if len(solutions) != (1 if rhs.ndim == 1 else rhs.shape[1]) or any(s.x.shape != expected for s in solutions):
            raise ConfigurationError(
                f"The solver {self.solver!r} must give one solution of shape {expected} for each of the right-hand"
                f" sides {list(rhs.shape)}, a list of them for columns; it gave"
                f" {[list(solution.x.shape) for solution in solutions]}."
            )
        for solution in solutions:
            require_finite(solution.x, f"The solution of {self.solver!r}")
        self.warn_unconverged(solutions)
        return solutions

    def solve_with_relative_damping(self, relative: float, operator: LinearOperator, rhs: Tensor) -> list[Solution]:
        """:meth:`solve` for one right-hand side, with a damping that is measured where none is named.

        Args:
            relative: The damping as a share of ``‖Bᵀb‖/‖b‖``, which takes a product.
            operator: ``B``, ``(rows, cols)``.
            rhs: ``b``, ``(rows,)``.

        Raises:
            ConvergenceError: See :meth:`solve`.
            NonFiniteError: Likewise.
        """
        if self.damping is not None:
            return self.solve(operator, rhs)
        before, length = (operator.products, operator.examples), float(norms(rhs))
        scale = float(norms(operator.rmatvec(rhs))) / length if length else 0.0
        spent = operator.products - before[0], operator.examples - before[1]
        found = replace(self, damping=relative * scale if math.isfinite(scale) else 0.0).solve(operator, rhs)
        return [replace(one, hvps=one.hvps + spent[0], examples=one.examples + spent[1]) for one in found]

    def quadratic_kind(self, size: int) -> str:
        """How :meth:`quadratic` has the inverse of a matrix of ``size`` rows, in words."""
        return "exact" if _is_small(size) else f"sketch of rank {self.max_iter}"

    def quadratic(self, operator: LinearOperator, damping: float) -> Callable[[Tensor], Tensor]:
        """``gᵀ(C + λ)⁻¹g`` of each row ``g`` of ``(m, n)`` as a function: exact for a small ``C``, else by a sketch.

        Args:
            operator: ``C``, ``(n, n)``, symmetric.
            damping: ``λ``.
        """
        size = operator.shape[0]
        if _is_small(size):
            matrix = to_matrix(operator).double()
            matrix.diagonal().add_(damping)
            factor = torch.linalg.lu_factor(matrix)
            return lambda rows: (rows.double().T * torch.linalg.lu_solve(*factor, rows.double().T)).sum(0)
        if not damping > 0:
            raise ConfigurationError(
                f"Self-influence on {size} parameters is estimated with a sketch of the curvature, which needs a"
                " `damping` above 0. Leave it out to have it measured."
            )
        assert self.max_iter is not None  # which is chosen for what is scored for itself
        found = low_rank(operator, self.max_iter, seed=self.seed)
        return lambda rows: found.quadratic(rows, damping)

    def warn_unconverged(self, solutions: list[Solution]) -> None:
        """Warns where a residual was asked for and not reached, or a solve met negative curvature.

        That ends a solve before the steps that it was asked for, so it counts without an ``rtol`` as well. A Newton
        step ends there by design (Nocedal and Wright, *Numerical Optimization*, 2nd ed., algorithm 7.1): what came
        before is a direction of descent, whose step size is decided by the losses.

        Raises:
            ConvergenceError: In the place of a warning, with ``unconverged="raise"``.
        """
        short = [solution for solution in solutions if self._falls_short(solution)]
        if short and self.unconverged != "ignore":
            worst = max(short, key=lambda solution: solution.residual)
            several = f" ({len(short)} of {len(solutions)} queries; the worst is told)" if len(solutions) > 1 else ""
            advice = _ADVICE[worst.status]
            if worst.status is Status.MAX_ITER and worst.solver not in ("lsmr", "truncated_newton"):
                advice += ", or take solver='lsmr'"
            asked = "no rtol was given" if self.rtol is None else f"rtol is {self.rtol:g}"
            larger = "" if worst.status is Status.INDEFINITE else "a larger `rtol` or "
            message = (
                f"The {worst.solver} solve ended as {str(worst.status)!r} with a relative residual of"
                f" {worst.residual:.2g} after {worst.iterations} steps ({worst.hvps} Hessian products){several};"
                f" {asked}. {advice}, or accept it by {larger}unconverged='ignore'."
            )
            if self.unconverged == "raise":
                raise ConvergenceError(message)
            rank_zero_warn(message, category=ConvergenceWarning)

    def _falls_short(self, solution: Solution) -> bool:
        """Whether a solve has not come as far as it was asked to."""
        if solution.status is Status.INDEFINITE:
            return solution.solver != "truncated_newton"
        return self.rtol is not None and not solution.converged


def _chosen(name: str, default: str) -> str:
    return default if name == AUTO else name


def _free_memory() -> float:
    """Bytes that are free on the machine, or in the container where that is less."""
    found = float(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return found if limit == "max" else min(found, float(limit) - float(used))
    except (OSError, ValueError):  # another system, or another version of control groups
        return found


_ADVICE = {
    Status.MAX_ITER: (
        "The result is a regularised one: directions of small curvature are not followed to their end. Raise `max_iter`"
        " or `damping`"
    ),
    Status.INDEFINITE: (
        "It ends where the curvature is not positive, and gives what came before, which need not be near a solution."
        " Use solver='lsmr', which takes any curvature, or curvature='ggn', or raise `damping`"
    ),
    Status.STALLED: "More steps do not help, rounding decides: use double=True, or a `damping` above 0",
}


def _require(name: str, value: Any, kind: Any, fits: Callable[[Any], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
        raise ConfigurationError(f"`{name}` must be {expected}, got {value!r}.")


def _is_small(size: int) -> bool:
    """Whether a matrix of ``size`` rows is made and inverted as it is."""
    return size <= _EXACT
