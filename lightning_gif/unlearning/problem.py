"""The edit problem: it solves for changes, and evaluates the model at given step sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from .._moved import renamed
from ..config import AUTO, Settings
from ..curvature.methods import Group, Method, Solve
from ..curvature.solve import (
    describe,
    max_iter,
    newton,
    open_curvature,
    solve,
    solve_with_relative_damping,
    warn_unconverged,
)
from ..curvature.streaming import Curvature
from ..errors import ConfigurationError, NonFiniteError, ObjectiveError
from ..solvers import LinearOperator, Solution
from ..solvers.operators import Combination, Scaled, Submatrix
from ..storage.digests import digest
from ..storage.schema import restored_fields
from . import leave_out
from .goals import Goal
from .journal import Journal
from .matching import Matching
from .memorization import measure
from .preconditioner import gradient_second_moment, preconditioner
from .protocol import Limits, QuadraticModel, Trial
from .task import Task
from .tuning import Tuning

__all__ = ["EditProblem"]


@dataclass(frozen=True)
class _Solved:
    """The values that a journal stores with a change.

    Attributes:
        slope: The slope of the quadratic model along the change.
        curvature: The curvature of the quadratic model.
        solution: The record of the solve.
        products: How the products with the curvature were computed.
        newton: Whether the change is a Newton step.
        damping: The relative damping of Newton steps.
    """

    slope: float
    curvature: float
    solution: dict[str, Any]
    products: dict[str, Any]
    newton: bool
    damping: float


_MATCHING = "Steps towards the predictions"
_PRODUCTS = "Hessian-vector products"


class EditProblem:
    """An edit in the making, as a strategy sees it: it solves for changes, and evaluates step sizes along them.

    Args:
        goal: The goal, with its tuned numbers.
        task: The data that the edit is decided on.
        tuning: All other tuned numbers.
        method: The influence method.
        positions: The target parameters ``(k,)``.
        journal: The journal that keeps the changes; ``None`` for none.
        uses_risk: Whether the strategy uses the risk of trials. If not, it is NaN.

    Attributes:
        goal: The goal: its name, its risk, its limits and its tuned numbers.
        tuning: All other tuned numbers.
        trials: All trials, in order; the first is the trained model.
        solutions: The solution for each change. If a method needs several solves for one change, the solution with the
            largest residual is kept.
        used: The settings that each solve used, where ``"auto"`` or ``None`` had left them open: ``curvature`` and
            ``max_iter``. The solutions have the others: ``rtol`` and ``damping``.
        newton_damping: The relative damping of the last Newton step, or of the first one before there is any.
        positions: The target parameters ``(k,)``.
        description: How the products with the curvature were computed, see the report.
        snapshots: The epochs of the snapshots that :meth:`leave_out` used.

    Raises:
        NonFiniteError: If the risk, or a loss, at the trained weights is not finite.
        ObjectiveError: If the new labels equal the old ones; from a solve, if the risk does not depend on the targets.
    """

    def __init__(
        self,
        goal: Goal,
        task: Task,
        tuning: Tuning,
        method: Method,
        positions: Tensor,
        journal: Journal | None = None,
        *,
        uses_risk: bool = True,
    ) -> None:
        self.goal, self.tuning, self.positions = goal, tuning, positions
        self.trials: list[Trial] = []
        self.solutions: list[Solution] = []
        self.used: list[dict[str, Any]] = []
        self.description: dict[str, Any] = {}
        self.snapshots: list[int] = []
        self.newton_damping = tuning.trust_region.initial_damping
        self._task, self._objective, self._settings = task, task.objective, task.settings
        self._method, self._journal, self._uses_risk = method, journal, uses_risk
        self._changes: list[Tensor] = []
        self._influence: tuple[int, QuadraticModel] | None = None  # the position of the influence direction's change
        self._last_newton: tuple[Trial, QuadraticModel] | None = None  # the trial at which the Newton step was solved
        self._predicted: dict[str, float] = {}  # mean losses that the change of leaving out predicts, by name

        if task.relabelled is not None and not task.influence_gradient.any():
            raise ObjectiveError("The new labels equal the old ones: there is nothing to correct. Check `relabel`.")
        self._terms = goal.risk(task) if uses_risk else []
        self._memorization = goal.memorization(task)
        # Weight decay belongs to the terms that are the training loss. It does not belong to terms that keep the
        # trained model's predictions, because these already include its effect.
        trained_on = sum(term.weight for term in self._terms if term.losses is self._objective)
        self._decay = self._settings.weight_decay * trained_on
        self.evaluate()

    @cached_property
    def limits(self) -> Limits:
        """:attr:`target_memorization` and :attr:`max_retain_loss`."""
        start = self.trials[0]
        return self.goal.limits(start, self._task.scales(start.retain_loss))

    @property
    def target_memorization(self) -> float | None:
        """The largest :attr:`Trial.memorization` that counts as forgotten or corrected; ``None`` if unknown."""
        return self.limits.target_memorization

    @property
    def max_retain_loss(self) -> float:
        """The largest retained loss that the edit may cause."""
        return self.limits.max_retain_loss

    # Evaluation

    def weights_at(self, step_sizes: tuple[float, ...]) -> Tensor:
        """The parameters ``(p,)`` at given step sizes.

        Raises:
            ConfigurationError: If there are more step sizes than changes.
        """
        if len(step_sizes) > len(self._changes):
            raise ConfigurationError(
                f"{len(step_sizes)} step sizes were given, but there are only {len(self._changes)} changes. Each call"
                " of problem.influence_direction, descent_direction, leave_out and match adds one."
            )
        theta = self._objective.theta.clone()
        for size, change in zip(step_sizes, self._changes, strict=False):
            theta.index_add_(0, self.positions, size * change)
        return theta

    def evaluate(self, *step_sizes: float) -> Trial:
        """Measures the model at given step sizes, and adds the trial to :attr:`trials`.

        Args:
            step_sizes: One step size for each change, in the order of the solves. Missing ones are 0.

        Raises:
            ConfigurationError: If there are more step sizes than changes.
            NonFiniteError: If the risk, or a loss, at the trained weights is not finite.
        """
        theta = self.weights_at(step_sizes)
        measured = measure(self._task, self._terms, self._memorization, theta)
        risk = self._decay / 2 * float(theta @ theta)
        for term, value in zip(self._terms, measured.terms, strict=True):
            baseline = 0.0
            if term.baseline_eval is not None:
                baseline = float(term.baseline_eval @ (theta - self._objective.theta))
            risk += term.weight * (value - baseline)
        sizes, losses = tuple(map(float, step_sizes)), (measured.forget_loss, measured.retain_loss)
        what, value = ("risk", risk) if self._uses_risk else ("loss", sum(losses))
        trial = Trial(sizes, *losses, risk if self._uses_risk else math.nan, measured.memorization)
        self.trials.append(trial)
        if len(self.trials) == 1 and not math.isfinite(value):
            raise NonFiniteError(
                f"The {what} at the trained weights is {value}: a loss or a prediction is not finite, or too large for"
                " float32 (try double=True). Nothing was changed."
            )
        return trial

    def memorization_at(self, theta: Tensor) -> float:
        """:attr:`Trial.memorization` at parameters ``(p,)``."""
        return math.nan if self._memorization is None else self._memorization.at(theta)

    def predicted_losses(self, before: dict[str, float], chosen: Trial) -> dict[str, float]:
        """The mean losses that theory predicts; NaN where it predicts nothing.

        After :meth:`leave_out` these are the losses if predictions were linear in the parameters. Along the influence
        direction the prediction is of first order for the forget examples, and of second order for the retained ones.
        There is none if the edit makes other changes, too.

        Args:
            before: The mean losses at the trained weights, by name.
            chosen: The trial whose losses are predicted.
        """
        predicted = dict.fromkeys(before, math.nan)
        others = (
            size for i, size in enumerate(chosen.step_sizes) if self._influence is None or i != self._influence[0]
        )
        if self._predicted:
            return predicted | self._predicted
        if self._influence is None or any(others):
            return predicted
        which, model = self._influence
        change = self._changes[which]
        step_size = chosen.step_sizes[which] if which < len(chosen.step_sizes) else 0.0
        curvature = model.curvature - self._settings.weight_decay * float(change @ change)  # without weight decay
        task = self._task
        slopes = {
            "forget": task.forget_gradient,
            "retain": task.retain_gradient,
            "relabelled": task.relabelled_gradient,
        }
        for name, slope in slopes.items():
            if slope is not None:
                along = step_size * float(slope[self.positions] @ change)
                predicted[name] = before[name] + along + (step_size**2 * curvature / 2 if name == "retain" else 0.0)
        return predicted

    # Solves

    def influence_direction(self) -> QuadraticModel:
        """Solves for the influence direction: the response to the removal or relabelling at the trained weights.

        Returns:
            The quadratic model of the risk along this change. Its slope is that of the whole risk. Its curvature is
            that of the retained loss alone.

        Raises:
            ConfigurationError: If the strategy declares that it does not use the risk.
            ObjectiveError: If the loss of the forget examples does not depend on the targets.
        """
        self._require_risk("influence_direction")
        settings = _with_curvature(self._settings, "hessian")
        model, _ = self._recalled_or_solved(["influence"], settings, partial(self._solve_influence, settings))
        self._influence = len(self._changes) - 1, model
        return model

    def leave_out(self) -> None:
        """Solves for the change that training without the forget examples, or with new labels, would have made.

        For a removal the change is ``(G + D)⁻¹g``. ``G`` is the Gauss–Newton matrix on the targets, and ``D`` the
        damping that the training is equivalent to, see
        :class:`~lightning_gif.selection.training_length.TrainingLength`, or the given ``damping``. Without either it is
        a share of the largest eigenvalue of ``G``. For new labels, the change is the minimum of their loss with the
        same ``G`` and ``D``, see :mod:`~lightning_gif.unlearning.relabelling`.

        Raises:
            ObjectiveError: If the loss of the forget examples does not depend on the targets.
        """
        settings = _with_curvature(self._settings, "ggn")
        if settings.max_iter is None and settings.rtol is None:
            settings = replace(settings, max_iter=self.tuning.matching.iterations)
        self._recalled_or_solved(["leave out"], settings, partial(self._solve_leave_out, settings))
        self.snapshots = list(self._task.earlier) if self.tuning.matching.earlier_share else []
        self._predicted = leave_out.predicted_losses(self._task, self.positions, self._changes[-1])

    @property
    def predictions(self) -> tuple[float, float]:
        """The losses of the forget and of the retained examples that the change of :meth:`leave_out` predicts.

        Raises:
            ConfigurationError: If :meth:`leave_out` has not been called.
        """
        if not self._predicted:
            raise ConfigurationError("Nothing is predicted yet: call problem.leave_out first.")
        return self._predicted["forget"], self._predicted["retain"]

    def match(self) -> None:
        """Adds a change after that of :meth:`leave_out`: the predictions on the forget examples become as predicted.

        A short training on forget and retained examples finds it, see
        :func:`~lightning_gif.unlearning.matching.match`.

        Raises:
            ConfigurationError: If the last change is not that of :meth:`leave_out`.
        """
        if len(self._changes) != 1 or not self._predicted:
            raise ConfigurationError("problem.match follows problem.leave_out, with no other change before or between.")
        numbers = self.tuning.matching.of(len(self._task.relabelled or ()))
        settings = replace(self._settings, max_iter=max(numbers.steps, 1))
        self._recalled_or_solved(["match", 1.0], settings, partial(self._solve_match, settings, numbers))

    def descent_direction(self, at: Trial) -> QuadraticModel:
        """Solves, at the weights of a trial, for a change that lowers the risk.

        The first change is solved with the method of the edit. So are later changes while memorization is far from its
        target, because least-squares problems have a solution for any curvature. These later changes use the curvature
        of a bound for terms of the risk that have one. If the risk is convex, changes of this kind are damped, and more
        after each rejected step since ``at``. All other changes are damped Newton steps on the targets.

        Args:
            at: The trial.

        Returns:
            The quadratic model of the risk along this change.

        Raises:
            ConfigurationError: If the strategy declares that it does not use the risk.
            ObjectiveError: If the risk does not depend on the targets.
        """
        self._require_risk("descent_direction")
        # A convex risk has a Gauss–Newton matrix without negative eigenvalues.
        settings = _with_curvature(self._settings, "ggn" if self.goal.is_convex(self._task) else "hessian")
        if settings.max_iter is None and settings.rtol is None:
            settings = replace(settings, max_iter=self.goal.descent_iterations)
        model, newton = self._recalled_or_solved(
            ["descent", *at.step_sizes], settings, partial(self._solve_descent, at, settings)
        )
        self._last_newton = (at, model) if newton else None
        return model

    def _require_risk(self, called: str) -> None:
        if not self._uses_risk:
            raise ConfigurationError(
                f"problem.{called} needs the risk, but the strategy declares uses_risk=False. Leave that out."
            )

    def _recalled_or_solved(
        self, question: list[Any], settings: Settings, solve: Callable[[], tuple[QuadraticModel, bool]]
    ) -> tuple[QuadraticModel, bool]:
        """Adds a change from the journal, or else solves for it and stores it there.

        Args:
            question: The kind of the change, and the step sizes of the trial at which it is solved.
            settings: The settings of the solve.
            solve: Solves for the change.

        Returns:
            The quadratic model along the change, and whether it is a Newton step.
        """
        journal, position = self._journal, len(self._changes)
        if journal is None:
            return solve()
        start = self.trials[0]  # its numbers identify the loss function, which the fingerprint does not
        seen = [f"{value:.4g}" for value in (start.forget_loss, start.retain_loss, start.risk)]
        question = [*question, *seen, digest({str(number): change for number, change in enumerate(self._changes)})]
        recalled = journal.recall(position, question, len(self.positions))
        if recalled is None:
            model, newton = solve()
            solution = self.solutions[-1].record()
            solved = _Solved(*model, solution, self.description, newton, self.newton_damping)
            journal.keep(position, question, self._changes[-1], asdict(solved))
            return model, newton
        change, record = recalled
        with journal.parse_errors_name(position):
            solved = _Solved(**restored_fields(_Solved, record))
            past = Solution.of_record(solved.solution)
            if not all(map(math.isfinite, (solved.slope, solved.curvature, solved.damping))) or solved.damping <= 0:
                raise ValueError(
                    f"it has slope {solved.slope}, curvature {solved.curvature} and damping {solved.damping}"
                )
        warn_unconverged(self._settings, [past], is_newton=solved.newton)
        self._add(change.to(self._objective.theta), past, settings)
        self.description, self.newton_damping = self.description or solved.products, solved.damping
        return QuadraticModel(solved.slope, solved.curvature), solved.newton

    def _solve_influence(self, settings: Settings) -> tuple[QuadraticModel, bool]:
        objective, task = self._objective, self._task
        with objective.progress.stage(_PRODUCTS) as update:
            kept = task.budget.for_curvatures(settings, 1)
            opened = partial(open_curvature, kept, objective, on_product=update)
            curvature = opened(task.retain_fit)
            new = None if task.relabelled_eval is None else opened(task.relabelled_eval, keep=False)
            share = task.forget_weight / (1 + task.forget_weight)
            group = Group(share, opened(task.forget_eval, keep=False), new)
            along = self._add_change(curvature, task.influence_gradient, partial(solve, settings), settings, group)
            curvature.warn_if_zero()
            self.description = self.description or describe(settings, curvature)
            gradients = (term.weight * term.eval_gradient(objective) for term in self._terms)
            slope = sum(gradients, self._decay * objective.theta)
        return QuadraticModel(float(slope[self.positions] @ self._changes[-1]), along), False

    def _solve_leave_out(self, settings: Settings) -> tuple[QuadraticModel, bool]:
        self._require_effect(self._task.influence_gradient[self.positions])
        with self._objective.progress.stage(_PRODUCTS) as update:
            found = leave_out.solve_step(self._task, settings, self.tuning.matching, self.positions, update)
        self._require_change(found.change)
        self._add(found.change, found.solution, settings)
        self.description = self.description or found.products
        # The solve for new labels is not linear, like a Newton step.
        return QuadraticModel(0.0, 0.0), self._task.relabelled is not None

    def _solve_match(self, settings: Settings, numbers: Matching) -> tuple[QuadraticModel, bool]:
        (change,), (solution,) = self._changes, self.solutions
        self._objective.progress.expect((_MATCHING, 1.0))
        with self._objective.progress.stage(_MATCHING, numbers.steps) as update:
            found, done = leave_out.match_predictions(
                self._task, settings, numbers, self.positions, change, solution.damping, update
            )
        self._add(found, done, settings)
        return QuadraticModel(0.0, 0.0), False

    def _solve_descent(self, at: Trial, settings: Settings) -> tuple[QuadraticModel, bool]:
        objective, goal = self._objective, self.goal
        theta = self.weights_at(at.step_sizes)
        is_far = at.memorization > goal.far_memorization
        first = len(self._changes) + 1
        last = max(first, self.tuning.relinearisation.max_solves)
        changes = [(f"Change {number}: {_PRODUCTS}", 1.0) for number in range(first, last + 1)]
        objective.progress.expect(*changes, at_most=True)
        with objective.progress.stage(changes[0][0]) as update:
            slope, curvatures, second_moment = self._linearise(theta, is_far, settings, update)
            whole = Combination(*curvatures)
            scale = preconditioner(objective, self.positions, second_moment, self.tuning.preconditioner)
            is_newton = bool(self._changes) and not is_far
            if is_newton:
                along = self._add_newton_step(whole, -slope, at, scale, settings)
            else:
                solver: Solve = partial(solve, settings)
                if goal.is_convex(self._task):
                    factor = self.tuning.trust_region.rejection_factor
                    relative = goal.first_damping * factor ** self._n_rejected_since(at)
                    solver = partial(solve_with_relative_damping, settings, relative)
                along = self._add_change(whole, -slope, solver, settings, scale=scale)
            self.description = self.description or describe(settings, curvatures[0][1])
        return QuadraticModel(float(slope[self.positions] @ self._changes[-1]), along), is_newton

    def _linearise(
        self, theta: Tensor, is_far: bool, settings: Settings, on_product: Callable[[], Any]
    ) -> tuple[Tensor, list[tuple[float, Curvature]], Tensor | None]:
        """The gradient ``(p,)`` of the risk, its curvature, and the gradient second moment ``(p,)``.

        Args:
            theta: Parameters ``(p,)``.
            is_far: Whether memorization there is far from its target.
            settings: The settings of the solve.
            on_product: Called after each product with the curvature.

        Returns:
            The gradient, the weight and the curvature of each term, and the second moment (``None`` if it is not used).
        """
        objective, goal = self._objective, self.goal
        slope, curvatures = self._decay * theta, list[tuple[float, Curvature]]()
        second_moment = torch.zeros_like(slope) if goal.scales_by_gradients else None
        budget = self._task.budget.of_a_solve()
        kept = budget.for_curvatures(settings, len(self._terms))
        for term in self._terms:
            slope = slope + term.weight * term.fit_gradient(objective, theta)
            count = math.ceil((goal.far_curvature_share if is_far else 1.0) * term.n_curvature)
            part = budget.sample(term.fit, count, settings.seed + len(self._changes))
            losses = term.bound if term.bound is not None and self._changes and is_far else term.losses
            decay = 0.0 if curvatures else self._decay  # the first term, of weight 1, has the decay of the whole risk
            curvature = open_curvature(
                kept, objective, part, theta, losses=losses, weight_decay=decay, on_product=on_product
            )
            curvatures.append((term.weight, curvature))
            if second_moment is not None:
                groups = self.tuning.preconditioner.groups
                moment = gradient_second_moment(objective, part, term.losses, theta, groups)
                second_moment += term.weight * moment
        return slope, curvatures, second_moment

    def _n_rejected_since(self, at: Trial) -> int:
        """The number of rejected changes since ``at``, not counting the influence direction."""
        count = len(self._changes) - len(at.step_sizes)
        return count - (self._influence is not None and self._influence[0] >= len(at.step_sizes))

    def _add_change(
        self,
        curvature: LinearOperator,
        gradient: Tensor,
        solve: Solve,
        settings: Settings,
        group: Group | None = None,
        scale: Tensor | None = None,
    ) -> float:
        """Solves for a change with the method of the edit, adds it, and returns the curvature along it."""
        self._require_effect(gradient[self.positions])
        change, solutions = self._method.edit(curvature, self.positions, gradient, solve, group, scale)
        self._require_change(change)
        self._add(change, max(solutions, key=lambda solution: solution.residual), settings)
        return float(change @ Submatrix(curvature, self.positions, self.positions).matvec(change))

    def _require_effect(self, gradient: Tensor) -> None:
        """Raises an error if the gradient ``(k,)`` of the risk on the targets is zero."""
        if not gradient.any():
            raise ObjectiveError(
                "The loss of the forget examples, or the risk, does not depend on the target parameters: its gradient"
                " on all of them is exactly zero. Possibly the model already makes the desired predictions with"
                " certainty, so there is nothing to forget or to correct. Otherwise use targets='batch', a larger"
                " ratio, or method='if'."
            )

    def _require_change(self, change: Tensor) -> None:
        """Raises an error if a change ``(k,)`` is zero."""
        if not change.any():
            raise ObjectiveError(
                "The solve returned a change of zero: the retained loss has no curvature along the target parameters."
                " Use other targets, a larger ratio, or method='if'."
            )

    def _add_newton_step(
        self, curvature: LinearOperator, gradient: Tensor, at: Trial, scale: Tensor, settings: Settings
    ) -> float:
        """Solves for a damped Newton step on the targets, adds it, and returns the curvature along it."""
        if self._last_newton is not None:
            start, model = self._last_newton
            step_size = at.step_sizes[-1] if len(at.step_sizes) == len(self._changes) else 0.0
            self.newton_damping = self.tuning.trust_region.next_damping(
                self.newton_damping, step_size, at.risk - start.risk, model.change(step_size)
            )
        scale = scale[self.positions]
        matrix = Scaled(Submatrix(curvature, self.positions, self.positions), scale, rows=True)
        rhs = scale * gradient[self.positions]
        solution, along = newton(settings, matrix, rhs, self.newton_damping)
        self._add(scale * solution.x, solution, settings)
        return along

    def _add(self, change: Tensor, solution: Solution, settings: Settings) -> None:
        """Adds a change ``(k,)`` with the solution and the settings of its solve."""
        self._changes.append(change)
        self.solutions.append(solution)
        self.used.append({"curvature": settings.curvature, "max_iter": max_iter(settings)})

    # Old names

    path = renamed("walk.path", "trials")
    enough = renamed("walk.enough", "target_memorization")
    affordable = renamed("walk.affordable", "max_retain_loss")
    answer = renamed("walk.answer", "influence_direction")
    descend = renamed("walk.descend", "descent_direction")
    measure = renamed("walk.measure", "evaluate")


def _with_curvature(settings: Settings, default: str) -> Settings:
    """The settings with this kind of curvature, unless they have one."""
    return replace(settings, curvature=default) if settings.curvature == AUTO else settings
