"""The influence methods: which rows and columns of the curvature form the linear system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError, ObjectiveError
from ..parameters import ParameterSpace, Targets
from ..registry import Registry
from ..solvers import LinearOperator, Solution
from ..solvers.operators import Combination, Scaled, Submatrix, is_positive_semidefinite, scatter

__all__ = ["METHODS", "Group", "Method"]


Solve = Callable[[LinearOperator, Tensor], "Solution | list[Solution]"]
"""A solver with its options: ``(matrix, rhs) →`` one solution if ``rhs`` is a vector, a list if it has columns."""


@dataclass(frozen=True)
class Group:
    """The curvature of the forget examples, for methods that need it.

    Attributes:
        share: ``m/n``, their share of all training examples.
        old: Their curvature with the old labels.
        new: Their curvature with the new labels; ``None`` if the examples are removed.
    """

    share: float
    old: LinearOperator
    new: LinearOperator | None


@dataclass(frozen=True)
class Method:
    """An influence method, defined by the rows and columns of the curvature that form its least-squares problem.

    Let ``A = C[rows, cols]``, with the pseudo-inverse ``A⁺``. For a weighted gradient ``g``, the change of the target
    parameters ``S`` is ``x = (A⁺ g[rows])[S]``. All first-order methods of the GIF paper (arXiv 2312.05586, section 4)
    have this form.

    Attributes:
        rows: The rows of ``A``: ``"all"`` or ``"targets"``.
        cols: The columns of ``A``: ``"all"`` or ``"targets"``.
        selects: Whether the method changes only selected target parameters. Otherwise all parameters are targets.
    """

    rows: str = "all"
    cols: str = "all"
    selects: bool = True

    @property
    def is_square(self) -> bool:
        """Whether ``A`` has the same rows and columns, so that it is symmetric."""
        return self.rows == self.cols

    @property
    def is_symmetric(self) -> bool:
        """Whether ``x = C[S, S]⁻¹ g[S]``, a symmetric map on the target parameters, as self-influence needs."""
        return self.is_square and (self.cols == "targets" or not self.selects)

    def edit(
        self,
        curvature: LinearOperator,
        targets: Tensor,
        gradient: Tensor,
        solve: Solve,
        group: Group | None = None,
        units: Tensor | None = None,
    ) -> tuple[Tensor, list[Solution]]:
        """The change of the targets for a weighted gradient.

        Args:
            curvature: The curvature ``C``, ``(p, p)``.
            targets: The positions of the target parameters ``S``, ``(k,)``.
            gradient: The weighted gradient ``g``, ``(p,)``.
            solve: Solves for one or several right-hand sides.
            group: The curvature of the forget examples, for methods that need it.
            units: A scale ``d > 0`` of each entry, ``(p,)``: the solver computes ``y``, and ``x = d y``. Without
                damping, a unique solution stays the same. A solve that stops early changes entries with a larger scale
                more, and damping acts on ``y``. A positive semi-definite matrix is scaled from both sides, so that it
                remains positive semi-definite.

        Returns:
            The change ``x`` ``(k,)``, and the solution of each solve.
        """
        matrix: LinearOperator = self._matrix(curvature, targets)
        rhs = gradient if self.rows == "all" else gradient[targets]
        symmetric = is_positive_semidefinite(matrix)
        if units is not None:
            units = units if self.cols == "all" else units[targets]
            matrix = Scaled(matrix, units, rows=symmetric)
            rhs = units * rhs if symmetric else rhs
        (solution,) = _as_list(solve(matrix, rhs))
        change = solution.x if units is None else units * solution.x
        return (change if self.cols == "targets" else change[targets]), [solution]

    def query(
        self, curvature: LinearOperator, targets: Tensor, gradients: Tensor, solve: Solve
    ) -> tuple[Tensor, list[Solution]]:
        """The iHVPs ``w`` of queries: the vectors with ``wᵀg = q[S]ᵀx(g)`` for every gradient ``g``.

        The map ``g → x`` is linear. Its adjoint maps the gradient ``q`` of a query to ``w``. With ``w``, each training
        example takes only one inner product with its gradient. The adjoint of a pseudo-inverse is the pseudo-inverse of
        the transpose, so the same solver is run on ``Aᵀ`` with the right-hand side ``q[S]``. All queries are solved
        together.

        Args:
            curvature: The curvature ``C``, ``(p, p)``.
            targets: The positions of the target parameters ``S``, ``(k,)``.
            gradients: The gradients of the queries, ``(n_queries, p)``.
            solve: Solves for one or several right-hand sides.

        Returns:
            The iHVP of each query, ``(n_queries, p)``, and the solution of each solve.

        Raises:
            ObjectiveError: If the gradient of a query is zero on all targets.
        """
        size = curvature.shape[0]
        on_targets = gradients[:, targets].T
        blind = (~on_targets.any(dim=0)).nonzero().flatten().tolist()
        if blind:
            which = f"The query {blind[0]}" if len(gradients) > 1 else "The query"
            remedy = (
                "no training example can influence it through them. Use targets='batch', a larger ratio, or"
                " method='if'."
                if self.selects
                else "no training example can influence it. Either the model is certain of it, or the loss compares"
                " examples with each other, and is constant for a single one. Query other examples, or"
                " define `influence_loss` (see GIFMixin)."
            )
            raise ObjectiveError(
                f"{which} does not depend on the {'target ' if self.selects else ''}parameters: its gradient on all of"
                f" them is exactly zero, so {remedy}"
            )
        rhs = on_targets if self.cols == "targets" else scatter(on_targets, targets, size)
        solutions = _as_list(solve(self._matrix(curvature, targets).T, rhs))
        ihvps = torch.stack([solution.x for solution in solutions], dim=1)
        return (ihvps if self.rows == "all" else scatter(ihvps, targets, size)).T, solutions

    def _matrix(self, curvature: LinearOperator, targets: Tensor) -> Submatrix:
        return Submatrix(
            curvature,
            targets if self.rows == "targets" else None,
            targets if self.cols == "targets" else None,
        )

    def targets(self, space: ParameterSpace, selected: Callable[[], Targets]) -> Targets:
        """The parameters that the method changes: the selected targets, or all parameters."""
        return selected() if self.selects else Targets.whole(space)


@dataclass(frozen=True)
class SecondOrder(Method):
    """The second-order influence of a group on all parameters (Basu, You and Feizi, ICML 2020).

    Let ``L`` be the objective on all data, and ``L'`` the objective without the forget examples or with new labels for
    them. The minimiser of ``L + t(L' − L)`` is expanded in ``t`` up to ``t²``, without third derivatives of the losses.
    With ``C`` the curvature of ``L`` and ``C'`` the curvature of ``L'``, the first-order term is
    ``θ₁ = C⁻¹∇(L − L')``, and the second-order term ``C⁻¹(C − C')θ₁``.
    """

    @property
    def is_symmetric(self) -> bool:
        """No: the second-order term depends on the whole group."""
        return False

    def edit(
        self,
        curvature: LinearOperator,
        targets: Tensor,
        gradient: Tensor,
        solve: Solve,
        group: Group | None = None,
        units: Tensor | None = None,
    ) -> tuple[Tensor, list[Solution]]:
        """The change of all parameters, and the solutions of both solves.

        Without a group only the first-order term is computed. With a group, ``units`` are ignored.
        """
        if group is None:
            return super().edit(curvature, targets, gradient, solve, units=units)
        whole = Combination((1 - group.share, curvature), (group.share, group.old))
        # Let p be the group's share. Removal: L' is the mean loss of the retained data, and C − C' = p (C_U − C_R).
        # Relabelling: L' is the mean loss of all data with the new labels, and C − C' = p (C_old − C_new).
        removal = group.new is None
        difference = Combination(
            (group.share, group.old), (-group.share, curvature if group.new is None else group.new)
        )
        (first,) = _as_list(solve(whole, gradient if removal else (1 - group.share) * gradient))
        (second,) = _as_list(solve(whole, difference.matvec(first.x)))
        return first.x + second.x, [first, second]

    def query(
        self, curvature: LinearOperator, targets: Tensor, gradients: Tensor, solve: Solve
    ) -> tuple[Tensor, list[Solution]]:
        """Not available: second-order influence is defined for a group, not for a single training example.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "method='sif' is the second-order influence of a group that is removed or relabelled. It has no scores for"
            " single training examples. Use method='if' or 'gif'."
        )


def _as_list(solutions: Solution | list[Solution]) -> list[Solution]:
    return solutions if isinstance(solutions, list) else [solutions]


METHODS: Registry[Method] = Registry("method")
"""The influence methods by their names in the GIF paper."""


METHODS.register("gif")(Method(rows="all", cols="targets"))


METHODS.register("fif")(Method(rows="targets", cols="targets"))


METHODS.register("pif")(Method(rows="all", cols="all"))


METHODS.register("if")(Method(rows="all", cols="all", selects=False))


METHODS.register("sif")(SecondOrder(selects=False))
