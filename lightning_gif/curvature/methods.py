"""The influence methods: which rows and columns of the curvature an equation is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError, ObjectiveError
from ..parameters import ParameterSpace, Targets
from ..registry import Registry
from ..solvers import LinearOperator, Solution
from ..solvers.operators import Combination, Scaled, Submatrix, scatter

__all__ = ["METHODS", "Group", "Method"]


Solve = Callable[[LinearOperator, Tensor], "Solution | list[Solution]"]


@dataclass(frozen=True)
class Group:
    """The examples in question, for methods that look at their curvature as well.

    Attributes:
        share: ``p = m/n``, of all training examples.
        old: Their curvature with the labels that they were trained with.
        new: The same with corrected labels; ``None`` if they are removed.
    """

    share: float
    old: LinearOperator
    new: LinearOperator | None


@dataclass(frozen=True)
class Method:
    """Which rows and columns of the curvature an influence method inverts, in the least-squares sense.

    With ``M = C[rows, cols]``, the change of the targets for a weighted gradient ``g`` is ``x = (M⁺ g[rows])[S]``. The
    first-order methods of the GIF paper (arXiv 2312.05586, section 4) are all of this form.

    Attributes:
        rows: ``"all"`` or ``"targets"``.
        cols: ``"all"`` or ``"targets"``.
        selects: ``False`` if the method changes every parameter, whatever was selected.
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
        """The change of the targets that answers a weighted gradient, and the solves.

        Args:
            curvature: ``C``, ``(p, p)``.
            targets: ``S``, ``(k,)``.
            gradient: ``g``, ``(p,)``.
            solve: See :func:`~lightning_gif.curvature.solve.solve`.
            group: The examples in question, for methods that ask for them.
            units: ``d > 0`` ``(p,)``: the solve is for ``y`` in ``x = d y``. An unregularised minimiser that is unique
                stays the same; a solve that stops early moves more what has larger units, and damping is on ``y``.

        Returns:
            ``x`` ``(k,)``, and a solution for each solve.
        """
        matrix: LinearOperator = self._matrix(curvature, targets)
        if units is not None:
            units = units if self.cols == "all" else units[targets]
            matrix = Scaled(matrix, units)
        (solution,) = _as_list(solve(matrix, gradient if self.rows == "all" else gradient[targets]))
        change = solution.x if units is None else units * solution.x
        return (change if self.cols == "targets" else change[targets]), [solution]

    def query(
        self, curvature: LinearOperator, targets: Tensor, gradients: Tensor, solve: Solve
    ) -> tuple[Tensor, list[Solution]]:
        """The vectors ``w`` for which ``wᵀg = q[S]ᵀx(g)`` for every ``g``, and the solves.

        The map ``g → x`` is linear, so its adjoint takes a query's gradient ``q`` to ``w`` once, and then each
        training example costs one inner product with its gradient. The adjoint of a pseudo-inverse is the
        pseudo-inverse of the transpose: the same solver on ``Mᵀ``, right-hand side ``q[S]``. All queries are solved
        together.

        Args:
            curvature: ``C``, ``(p, p)``.
            targets: ``S``, ``(k,)``.
            gradients: Of the queries, ``(n_queries, p)``.
            solve: See :func:`~lightning_gif.curvature.solve.solve`.

        Returns:
            ``(n_queries, p)``, and a solution for each.

        Raises:
            ObjectiveError: If the gradient of a query vanishes on all targets.
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
        found = torch.stack([solution.x for solution in solutions], dim=1)
        return (found if self.rows == "all" else scatter(found, targets, size)).T, solutions

    def _matrix(self, curvature: LinearOperator, targets: Tensor) -> Submatrix:
        return Submatrix(
            curvature,
            targets if self.rows == "targets" else None,
            targets if self.cols == "targets" else None,
        )

    def targets(self, space: ParameterSpace, selected: Callable[[], Targets]) -> Targets:
        """What the method changes: the selection, or everything."""
        return selected() if self.selects else Targets.whole(space)


@dataclass(frozen=True)
class SecondOrder(Method):
    """The second-order influence of a group on all parameters (Basu, You and Feizi, ICML 2020).

    The risk is led from that on all data, ``L``, to the one that should hold, ``L'``, along the straight line
    ``L + t(L' − L)``; its minimiser is expanded in ``t`` up to ``t²``, without third derivatives of the losses. With
    ``C`` the curvature of ``L`` and ``C'`` that of ``L'``, ``θ₁ = C⁻¹∇(L − L')`` is the first order, and
    ``C⁻¹(C − C')θ₁`` the second.
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
        """The change of all parameters, and the two solves; without a group there is no second order.

        With one there are no other units.
        """
        if group is None:
            return super().edit(curvature, targets, gradient, solve, units=units)
        whole = Combination((1 - group.share, curvature), (group.share, group.old))
        # Removal: L' is the risk on the retained data, and C − C' = p (C_U − C_R). Relabelling: L' is that on all
        # data with the new labels, and C − C' = p (C_old − C_new).
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
        """Raises: the second order is that of one given group, not of each training example."""
        raise ConfigurationError(
            "method='sif' is the second-order influence of a group that is removed or relabelled; it has no score for"
            " single training examples other than that of method='if'. Use 'if', or 'gif'."
        )


def _as_list(found: Solution | list[Solution]) -> list[Solution]:
    return found if isinstance(found, list) else [found]


METHODS: Registry[Method] = Registry("method")
"""The influence methods by the paper's names."""


METHODS.register("gif")(Method(rows="all", cols="targets"))


METHODS.register("fif")(Method(rows="targets", cols="targets"))


METHODS.register("pif")(Method(rows="all", cols="all"))


METHODS.register("if")(Method(rows="all", cols="all", selects=False))


METHODS.register("sif")(SecondOrder(selects=False))
