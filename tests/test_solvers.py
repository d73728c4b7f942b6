"""Solvers against dense linear algebra in float64, and what they say when they cannot succeed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_gif import SOLVERS, ConfigurationError, ConvergenceError, NonFiniteError
from lightning_gif.solvers import Status, dense, largest_singular_value, lissa, to_matrix


class Matrix:
    """A dense matrix that is only known by its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.products = 0
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector

    def rmatvec(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix.T @ vector


def with_singular_values(rows: int, values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(values) @ right.T


def symmetric_indefinite(values: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ).Q
    return basis @ torch.diag(values) @ basis.T


TALL = with_singular_values(60, torch.logspace(0.5, -0.5, 20, dtype=torch.float64))
INDEFINITE = symmetric_indefinite(torch.tensor([5.0, -4.0, 3.0, -2.0, 1.0, -0.7, 0.5], dtype=torch.float64))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("matrix", [TALL, INDEFINITE, TALL.T], ids=["tall", "indefinite", "wide"])
def test_lissa_finds_the_least_squares_solution_of_least_norm(matrix: Tensor, accelerate: bool) -> None:
    rhs = torch.randn(matrix.shape[0], dtype=torch.float64)
    found = lissa(Matrix(matrix), rhs, rtol=1e-10, max_iter=5000, accelerate=accelerate)
    assert found.converged
    assert relative(found.x, torch.linalg.pinv(matrix) @ rhs) < 1e-6


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("matrix", [TALL, INDEFINITE], ids=["tall", "indefinite"])
def test_damping_is_the_ridge_of_the_normal_equations(solver: str, matrix: Tensor) -> None:
    rhs = torch.randn(matrix.shape[0], dtype=torch.float64)
    found = SOLVERS[solver](Matrix(matrix), rhs, damping=0.8, rtol=1e-10, max_iter=5000, seed=0)
    normal = matrix.T @ matrix + 0.8**2 * torch.eye(matrix.shape[1], dtype=torch.float64)
    assert relative(found.x, torch.linalg.solve(normal, matrix.T @ rhs)) < 1e-6


def test_dense_drops_what_precision_cannot_tell_from_zero() -> None:
    matrix = with_singular_values(9, torch.tensor([2.0, 1.0, 1e-20, 0.0], dtype=torch.float64))
    rhs = torch.randn(9, dtype=torch.float64)
    assert relative(dense(Matrix(matrix), rhs).x, torch.linalg.pinv(matrix, rtol=1e-9) @ rhs) < 1e-9


def test_acceleration_needs_far_fewer_steps_on_an_ill_conditioned_problem() -> None:
    matrix = with_singular_values(80, torch.logspace(0, -2, 40, dtype=torch.float64))
    rhs = torch.randn(80, dtype=torch.float64)
    fast = lissa(Matrix(matrix), rhs, rtol=1e-4, max_iter=1000)
    plain = lissa(Matrix(matrix), rhs, rtol=1e-4, max_iter=10 * fast.iterations, accelerate=False)
    assert fast.converged
    assert plain.residual > 5 * fast.residual


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_the_diagnostics_are_those_of_the_returned_solution(solver: str) -> None:
    operator = Matrix(TALL)
    rhs = torch.randn(60, dtype=torch.float64)
    found = SOLVERS[solver](operator, rhs, damping=0.3, rtol=1e-5, max_iter=7, seed=0)
    normal = TALL.T @ rhs
    residual = normal - TALL.T @ (TALL @ found.x) - 0.3**2 * found.x
    # The iterate's own residual; rounding decides where it is at the level of rounding itself.
    assert found.residual == pytest.approx(float(residual.norm() / normal.norm()), rel=1e-6, abs=1e-12)
    assert found.unexplained == pytest.approx(float((TALL @ found.x - rhs).norm() / rhs.norm()))
    assert found.sigma_max == pytest.approx(float(torch.linalg.matrix_norm(TALL, 2)), rel=0.05)
    assert found.hvps == operator.products
    assert len(found.residuals) == found.iterations + 1
    assert min(found.residuals) == pytest.approx(found.residual)


def test_running_out_of_steps_is_not_called_convergence() -> None:
    rhs = torch.randn(60, dtype=torch.float64)
    assert lissa(Matrix(TALL), rhs, rtol=1e-12, max_iter=3).status is Status.MAX_ITER
    assert lissa(Matrix(TALL), rhs, rtol=1e-2, max_iter=500).status is Status.CONVERGED


def test_a_residual_below_float32_is_reported_as_stalled() -> None:
    found = lissa(Matrix(TALL.float()), torch.randn(60), rtol=1e-14, max_iter=5000)
    assert found.status is Status.STALLED
    assert found.iterations < 5000
    assert found.residual < 1e-5


@pytest.mark.parametrize("seed", range(20))
def test_lissa_converges_when_the_leading_direction_is_nearly_invisible_at_first(seed: int) -> None:
    """The power iteration misses a singular value that its start vector hardly sees; the steps themselves find it."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(31, generator=generator, dtype=torch.float64)  # as the estimate draws it
    hidden = torch.randn(31, generator=generator, dtype=torch.float64)
    hidden = hidden - (hidden @ start) / (start @ start) * start + 1e-9 * start
    others = torch.randn(31, 30, generator=generator, dtype=torch.float64)
    right = torch.linalg.qr(torch.cat([hidden[:, None], others], dim=1)).Q
    values = torch.cat([torch.tensor([1.6], dtype=torch.float64), torch.linspace(0.3, 1, 30, dtype=torch.float64)])
    matrix = right @ torch.diag(values) @ right.T
    estimate, bound = largest_singular_value(Matrix(matrix), seed=seed)
    assert bound < 1.2  # the premise
    rhs = torch.randn(31, dtype=torch.float64)
    found = lissa(Matrix(matrix), rhs, rtol=1e-8, max_iter=2000, seed=seed)
    assert found.converged
    assert found.sigma_max > 1.5 > estimate
    assert relative(found.x, torch.linalg.solve(matrix, rhs)) < 1e-6


@pytest.mark.parametrize("values", [torch.logspace(0, -4, 50), torch.linspace(0, 1, 50) ** 3, torch.randn(50)])
def test_the_scale_is_estimated_from_below_and_bounded_from_above(values: Tensor) -> None:
    matrix = symmetric_indefinite(values.double())
    truth = float(values.abs().max())
    for seed in range(10):
        estimate, bound = largest_singular_value(Matrix(matrix), seed=seed)
        assert estimate <= truth * (1 + 1e-9)
        assert bound >= 0.9 * truth
        assert bound <= 1.05 * truth


def test_the_same_seed_gives_the_same_bits() -> None:
    rhs = torch.randn(60)
    first, second = (lissa(Matrix(TALL.float()), rhs, seed=3, max_iter=20) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert first.residuals == second.residuals


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_right_hand_side_that_nothing_can_answer_gives_zero(solver: str) -> None:
    for matrix, rhs in ((TALL, torch.zeros(60, dtype=torch.float64)), (torch.zeros(5, 3), torch.ones(5))):
        found = SOLVERS[solver](Matrix(matrix), rhs, damping=0.0, rtol=1e-6, max_iter=10, seed=0)
        assert found.converged
        assert not found.x.any()


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_raise(solver: str, bad: float) -> None:
    matrix, rhs = TALL.clone(), torch.randn(60, dtype=torch.float64)
    matrix[3, 4] = bad
    with pytest.raises(NonFiniteError, match="non-finite"):
        SOLVERS[solver](Matrix(matrix), rhs, damping=0.0, rtol=1e-6, max_iter=10, seed=0)
    rhs[0] = bad
    with pytest.raises(NonFiniteError, match="right-hand side"):
        SOLVERS[solver](Matrix(TALL), rhs, damping=0.0, rtol=1e-6, max_iter=10, seed=0)


def test_an_operator_that_changes_between_products_is_called_out() -> None:
    class Restless(Matrix):
        def matvec(self, vector: Tensor) -> Tensor:
            return super().matvec(vector) if self.products < 30 else -super().matvec(vector)

    with pytest.raises(ConvergenceError, match="not the same function"):
        lissa(Restless(TALL), torch.randn(60, dtype=torch.float64), rtol=1e-10, max_iter=2000)


def test_dense_refuses_a_matrix_that_would_not_fit() -> None:
    operator = Matrix(torch.empty(100_000, 1_000, device="meta"))
    with pytest.raises(ConfigurationError, match="solver='lissa'"):
        to_matrix(operator)
    assert operator.products == 0


@pytest.mark.parametrize("matrix", [TALL, TALL.T])
def test_to_matrix_spends_as_few_products_as_the_shorter_side(matrix: Tensor) -> None:
    operator = Matrix(matrix)
    assert torch.equal(to_matrix(operator), matrix)
    assert operator.products == min(matrix.shape)
