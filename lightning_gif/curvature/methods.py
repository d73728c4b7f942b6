"""The influence methods: which rows and columns of the curvature make up the linear system."""

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
"""``(matrix, rhs) →`` a solution for a vector, a list for columns: a solver with its options."""


@dataclass(frozen=True)
class Group:
    """The curvature of the forget examples, for methods that need it.

    Attributes:
        share: ``m/n``, their share of all training examples.
        old: Their curvature with the labels of training.
        new: The same with corrected labels; ``None`` if the examples are removed.
    """

    share: float
    old: LinearOperator
    new: LinearOperator | None


@dataclass(frozen=True)
class Method:
    """An influence method, given by the rows and columns of the curvature that it inverts in the least-squares sense.

    With ``A = C[rows, cols]``, the change of the target parameters ``S`` for a weighted gradient ``g`` is
    ``x = (A⁺ g[rows])[S]``. All first-order methods of the GIF paper (arXiv 2312.05586, section 4) have this form.

    Attributes:
        rows: ``"all"`` or ``"targets"``.
        cols: ``"all"`` or ``"targets"``.
        selects: Whether the method changes the selected target parameters only; if not, it changes every parameter.
    """

    rows: str = "all"
    cols: str = "all"
    selects: bool = True

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
            curvature: ``C``, ``(p, p)``.
            targets: ``S``, positions ``(k,)``.
            gradient: ``g``, ``(p,)``.
            solve: Solves for one or several right-hand sides.
            group: The curvature of the forget examples, for methods that need it.
            units: ``d > 0`` ``(p,)``: the solve is for ``y`` in ``x = d y``. A unique minimiser without damping stays
                the same; a solve that stops early changes entries with larger units more, and damping acts on ``y``.
                A positive semi-definite matrix is scaled from both sides, so that it remains one.

        Returns:
            ``x`` ``(k,)``, and the solution of each solve.
        """
        matrix: LinearOperator = self._matrix(curvature, targets)
        rhs = gradient if self.rows == "all" else gradient[targets]
        symmetric = is_positive_semidefinite(matrix)  # and to remain so
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
        """The vectors ``w`` for which ``wᵀg = q[S]ᵀx(g)`` for every ``g``.

        The map ``g → x`` is linear. Its adjoint takes the gradient ``q`` of a query to ``w`` once; then each training
        example costs one inner product with its gradient. The adjoint of a pseudo-inverse is the pseudo-inverse of the
        transpose: the same solver for ``Aᵀ`` and the right-hand side ``q[S]``. All queries are solved together.

        Args:
            curvature: ``C``, ``(p, p)``.
            targets: ``S``, positions ``(k,)``.
            gradients: The gradients of the queries, ``(n_queries, p)``.
            solve: Solves for one or several right-hand sides.

        Returns:
            ``w`` of each query, ``(n_queries, p)``, and the solution of each solve.

        Raises:
            ObjectiveError: If the gradient of a query is zero on all targets.
        """
        size = curvature.shape[0]
        on_targets = gradients[:, targets].T
        blind = (~on_targets.any(dim=0)).nonzero().flatten().tolist()
        if blind:
            which = f"The query {blind[0]}" if len(gradients) > 1 else "The query"
            raise ObjectiveError(
                f"{which} does not depend on the target parameters: its gradient on all of them is exactly zero, so"
                " no training example could have moved it through them. Use targets='batch', a larger ratio, or"
                " method='if'."
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
        """The parameters that the method changes: the selection, or all."""
        return selected() if self.selects else Targets.whole(space)


@dataclass(frozen=True)
class SecondOrder(Method):
    """The second-order influence of a group on all parameters (Basu, You and Feizi, ICML 2020).

    The objective moves from that on all data, ``L``, to the one without or with corrected forget examples, ``L'``,
    along the straight line ``L + t(L' − L)``. Its minimiser is expanded in ``t`` up to ``t²``, without third
    derivatives of the losses. With ``C`` the curvature of ``L`` and ``C'`` that of ``L'``, the first order is
    ``θ₁ = C⁻¹∇(L − L')``, and the second ``C⁻¹(C − C')θ₁``.
    """

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

        Without a group there is only the first order. With one, ``units`` are not used.
        """
        if group is None:
            return super().edit(curvature, targets, gradient, solve, units=units)
        whole = Combination((1 - group.share, curvature), (group.share, group.old))
        # Let p be the group's share. Removal: L' is the mean loss of the retained data, and C − C' = p (C_U − C_R).
        # Relabelling: L' is that of all data with the new labels, and C − C' = p (C_old − C_new).
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
        """Raises: the second-order influence is that of a group, not of each training example.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            "method='sif' is the second-order influence of a group that is removed or relabelled; it has no score for"
            " single training examples other than that of method='if'. Use 'if', or 'gif'."
        )


def _as_list(solutions: Solution | list[Solution]) -> list[Solution]:
    return solutions if isinstance(solutions, list) else [solutions]


METHODS: Registry[Method] = Registry("method")
"""The influence methods by the paper's names."""


METHODS.register("gif")(Method(rows="all", cols="targets"))


METHODS.register("fif")(Method(rows="targets", cols="targets"))


METHODS.register("pif")(Method(rows="all", cols="all"))


METHODS.register("if")(Method(rows="all", cols="all", selects=False))


METHODS.register("sif")(SecondOrder(selects=False))
