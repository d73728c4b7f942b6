"""Solvers against dense linear algebra in float64, and their reports if they cannot converge."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_gif import SOLVERS, ConfigurationError, ConvergenceError, NonFiniteError
from lightning_gif.solvers import (
    LinearOperator,
    Solver,
    SolverRegistry,
    cg,
    dense,
    low_rank,
    spectrum,
    stochastic_lissa,
    to_matrix,
    truncated_newton,
)
from lightning_gif.solvers.operators import (
    Combination,
    Scaled,
    Shifted,
    Submatrix,
    damped_system,
    is_positive_semidefinite,
)
from lightning_gif.solvers.solution import Solution, Status


class Matrix:
    """A dense matrix as an operator that counts its products. Each uses ten examples."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.products = 0
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    @property
    def examples(self) -> int:
        return 10 * self.products

    def matvec(self, vectors: Tensor) -> Tensor:
        self.products += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.matrix @ vectors

    def rmatvec(self, vectors: Tensor) -> Tensor:
        self.products += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.matrix.T @ vectors


class Mean(Matrix):
    """The mean of several matrices. A draw is one of them."""

    def __init__(self, parts: Tensor) -> None:
        super().__init__(parts.mean(0))
        self.parts = parts

    def draw(self, seed: int) -> Matrix:
        part = torch.randint(len(self.parts), (), generator=torch.Generator().manual_seed(seed))
        return Matrix(self.parts[part])


# Solvers that need only products, with many or few iterations.
ITERATIVE = ["lissa", "plain_lissa", "cgls", "lsmr"]
DETERMINISTIC = [*ITERATIVE, "dense"]
BUILT_IN = [*DETERMINISTIC, "stochastic_lissa", "cg", "nystrom"]


def solve(solver: str, matrix: Tensor, rhs: Tensor, **options: object) -> Solution:
    found = SOLVERS[solver](Matrix(matrix), rhs, **options)
    assert isinstance(found, Solution)
    return found


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


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("matrix", [TALL, INDEFINITE, TALL.T], ids=["tall", "indefinite", "wide"])
def test_the_solution_is_the_least_squares_solution_of_minimal_norm(matrix: Tensor, solver: str) -> None:
    rhs = torch.randn(matrix.shape[0], dtype=torch.float64)
    found = solve(solver, matrix, rhs, rtol=1e-10, max_iter=5000)
    assert found.converged
    assert relative(found.x, torch.linalg.pinv(matrix) @ rhs) < 1e-6


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("matrix", [TALL, INDEFINITE], ids=["tall", "indefinite"])
def test_damping_is_the_ridge_of_the_normal_equations(solver: str, matrix: Tensor) -> None:
    rhs = torch.randn(matrix.shape[0], dtype=torch.float64)
    found = SOLVERS[solver](Matrix(matrix), rhs, damping=0.8, rtol=1e-10, max_iter=5000, seed=0)
    normal = matrix.T @ matrix + 0.8**2 * torch.eye(matrix.shape[1], dtype=torch.float64)
    assert relative(found.x, torch.linalg.solve(normal, matrix.T @ rhs)) < 1e-6


def test_dense_drops_singular_values_at_rounding_level() -> None:
    matrix = with_singular_values(9, torch.tensor([2.0, 1.0, 1e-20, 0.0], dtype=torch.float64))
    rhs = torch.randn(9, dtype=torch.float64)
    assert relative(dense(Matrix(matrix), rhs).x, torch.linalg.pinv(matrix, rtol=1e-9) @ rhs) < 1e-9


def test_acceleration_needs_far_fewer_iterations_on_an_ill_conditioned_problem() -> None:
    matrix = with_singular_values(80, torch.logspace(0, -2, 40, dtype=torch.float64))
    rhs = torch.randn(80, dtype=torch.float64)
    fast = solve("lissa", matrix, rhs, rtol=1e-4, max_iter=1000)
    plain = solve("plain_lissa", matrix, rhs, rtol=1e-4, max_iter=10 * fast.iterations)
    krylov = solve("lsmr", matrix, rhs, rtol=1e-4, max_iter=1000)
    assert fast.converged
    assert krylov.converged
    assert plain.residual > 5 * fast.residual
    assert krylov.hvps < fast.hvps


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_the_diagnostics_are_those_of_the_returned_solution(solver: str) -> None:
    operator = Matrix(TALL)
    rhs = torch.randn(60, dtype=torch.float64)
    found = SOLVERS[solver](operator, rhs, damping=0.3, rtol=1e-5, max_iter=7, seed=0)
    assert isinstance(found, Solution)
    normal = TALL.T @ rhs
    residual = normal - TALL.T @ (TALL @ found.x) - 0.3**2 * found.x
    # The true residual of the iterate. At the level of rounding it depends on rounding.
    assert found.residual == pytest.approx(float(residual.norm() / normal.norm()), rel=1e-6, abs=1e-12)
    assert found.unexplained == pytest.approx(float((TALL @ found.x - rhs).norm() / rhs.norm()))
    assert found.sigma_max == pytest.approx(float(torch.linalg.matrix_norm(TALL, 2)), rel=0.05)
    assert found.hvps == operator.products
    assert found.examples == 10 * operator.products
    assert len(found.residuals) == found.iterations + 1
    assert min(found.residuals) == pytest.approx(found.residual)
    assert found.solver == solver
    assert found.peak_memory is None or found.peak_memory > 1e7  # this process holds torch


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_columns_are_solved_as_if_each_were_alone(solver: str) -> None:
    easy, hard = TALL[:, 0], torch.randn(60, dtype=torch.float64)
    rhs = torch.stack([easy, hard, torch.zeros_like(hard), 1e-3 * hard], dim=1)
    together = SOLVERS[solver](Matrix(TALL), rhs, damping=0.1, rtol=1e-9, max_iter=3000)
    assert isinstance(together, list)
    for column, found in zip(rhs.T, together, strict=True):
        alone = solve(solver, TALL, column, damping=0.1, rtol=1e-9, max_iter=3000)
        assert found.status is alone.status
        assert float((found.x - alone.x).norm()) <= 1e-6 * float(alone.x.norm())
    if solver != "dense":
        operator = Matrix(TALL)
        found = SOLVERS[solver](operator, rhs, damping=0.1, rtol=1e-6, max_iter=400)
        assert isinstance(found, list)
        assert sum(solution.hvps for solution in found) == operator.products
        assert found[2].iterations == 0  # nothing to solve, and no products while the other columns continue


@pytest.mark.parametrize("solver", ITERATIVE)
def test_a_warm_start_continues_from_the_given_solution(solver: str) -> None:
    rhs = torch.randn(60, dtype=torch.float64)
    exact = torch.linalg.pinv(TALL) @ rhs
    cold = solve(solver, TALL, rhs, rtol=1e-6, max_iter=3000)
    warm = solve(solver, TALL, rhs, rtol=1e-6, max_iter=3000, start=exact + 1e-4 * torch.randn(20, dtype=torch.float64))
    assert warm.converged
    assert warm.hvps < cold.hvps
    assert warm.residuals[0] < 1e-2
    done = solve(solver, TALL, rhs, rtol=1e-6, max_iter=3000, start=exact)
    assert done.iterations == 0
    assert done.hvps == 3


@pytest.mark.parametrize("solver", ITERATIVE)
def test_a_start_that_is_worse_than_zero_is_ignored(solver: str) -> None:
    rhs = torch.randn(60, dtype=torch.float64)
    found = solve(solver, TALL, rhs, rtol=1e-6, max_iter=3000, start=torch.full((20,), 1e6, dtype=torch.float64))
    assert found.residuals[0] == 1.0
    assert found.converged


@pytest.mark.parametrize("solver", ITERATIVE)
def test_a_solve_stops_at_its_discrepancy(solver: str) -> None:
    matrix = with_singular_values(80, torch.logspace(0, -3, 40, dtype=torch.float64))
    truth = torch.randn(40, dtype=torch.float64)
    noise = torch.randn(80, dtype=torch.float64)
    rhs = matrix @ truth
    noise *= 0.05 * rhs.norm() / noise.norm()
    found = solve(solver, matrix, rhs + noise, rtol=1e-12, max_iter=20_000, discrepancy=0.06)
    assert found.status is Status.DISCREPANCY
    assert found.converged
    assert found.unexplained <= 0.06
    assert found.residual > 1e-12


def test_a_solve_that_runs_out_of_iterations_is_not_converged() -> None:
    rhs = torch.randn(60, dtype=torch.float64)
    for solver in ITERATIVE:
        found = solve(solver, TALL, rhs, rtol=1e-12, max_iter=3)
        assert found.status is Status.MAX_ITER
        assert not found.converged
        assert found.iterations == 3
        assert solve(solver, TALL, rhs, rtol=1e-2, max_iter=500).status is Status.CONVERGED


@pytest.mark.parametrize("solver", ITERATIVE)
def test_a_residual_below_float32_is_reported_as_stalled(solver: str) -> None:
    found = solve(solver, TALL.float(), torch.randn(60), rtol=1e-14, max_iter=5000)
    assert found.status is Status.STALLED
    assert found.iterations < 5000
    assert found.residual < 1e-5
    assert torch.isfinite(found.x).all()


@pytest.mark.mostly_slow(8)
@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("condition", [1e1, 1e3])
@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6, 1e-12])
def test_a_solve_in_float32_reports_its_true_residual(solver: str, condition: float, rtol: float) -> None:
    """For a consistent system, the recursive residual goes to zero, while the true one does not."""
    values = torch.logspace(0, -1, 40, base=condition, dtype=torch.float64) * torch.tensor([1.0, -1.0]).repeat(20)
    matrix = symmetric_indefinite(values)
    rhs = matrix @ torch.randn(40, dtype=torch.float64)
    found = solve(solver, matrix.float(), rhs.float(), rtol=rtol, max_iter=500)
    normal = matrix @ rhs
    true = float((normal - matrix @ (matrix @ found.x.double())).norm() / normal.norm())
    assert true <= 1.5 * found.residual + 1e-6
    assert found.converged == (found.residual <= 1.02 * rtol)


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize(("sigma", "size"), [(1e-5, 1.0), (1e-4, 1e-11), (1.0, 1e-24), (1e4, 1e20)])
def test_tiny_and_huge_numbers_do_not_vanish_in_float32(solver: str, sigma: float, size: float) -> None:
    """Their squares overflow or underflow in float32. A network that interpolates its data has such small gradients."""
    matrix = sigma * TALL.float()
    rhs = size * torch.randn(60, generator=torch.Generator().manual_seed(1))
    found = solve(solver, matrix, rhs, rtol=1e-4, max_iter=2000)
    assert found.converged
    exact = torch.linalg.pinv(matrix.double()) @ rhs.double()
    assert relative(found.x.double(), exact) < 1e-2


@pytest.mark.parametrize("solver", ["cgls", "lsmr"])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_krylov_stops_past_convergence_and_does_not_turn_to_nan(solver: str, rank: int) -> None:
    """After as many iterations as singular values, the remainder is zero. Common implementations divide by it."""
    values = torch.cat([torch.logspace(0, -1, rank), torch.zeros(20 - rank)])
    matrix = with_singular_values(60, values.double()).float()
    rhs = torch.randn(60)
    found = solve(solver, matrix, rhs, rtol=1e-30, max_iter=10_000)
    assert found.status is Status.STALLED
    assert found.iterations < 500
    assert relative(found.x, torch.linalg.pinv(matrix.double(), rtol=1e-5).float() @ rhs) < 1e-3


def test_lsmr_gives_the_iterates_of_scipys_lsmr() -> None:
    sparse = pytest.importorskip("scipy.sparse.linalg")
    matrix = with_singular_values(80, torch.logspace(0, -2, 40, dtype=torch.float64))
    rhs = torch.randn(80, dtype=torch.float64)
    for steps in (1, 2, 5, 12):
        found = solve("lsmr", matrix, rhs, damping=0.05, rtol=1e-14, max_iter=steps)
        theirs = sparse.lsmr(matrix.numpy(), rhs.numpy(), damp=0.05, atol=0, btol=0, conlim=0, maxiter=steps)[0]
        torch.testing.assert_close(found.x, torch.from_numpy(theirs), rtol=1e-7, atol=1e-10)
        assert found.residuals == sorted(found.residuals, reverse=True)


def test_lsmr_has_the_smallest_residual_at_every_number_of_products() -> None:
    matrix = with_singular_values(80, torch.logspace(0, -2, 40, dtype=torch.float64))
    rhs = matrix @ torch.randn(40, dtype=torch.float64)
    for steps in (3, 8, 15):
        options = {"rtol": 1e-14, "max_iter": steps}
        every = {solver: solve(solver, matrix, rhs, **options) for solver in ITERATIVE}
        assert every["lsmr"].residual <= min(found.residual for found in every.values()) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_lissa_converges_if_the_right_hand_side_hardly_contains_the_leading_direction(seed: int) -> None:
    """The first estimate misses a singular value that is hardly in the right-hand side. The iterations find it."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.linalg.qr(torch.randn(31, 31, generator=generator, dtype=torch.float64)).Q
    values = torch.cat([torch.tensor([1.6], dtype=torch.float64), torch.linspace(0.3, 1, 30, dtype=torch.float64)])
    matrix = right @ torch.diag(values) @ right.T
    shares = torch.randn(31, generator=generator, dtype=torch.float64)
    shares[0] = 1e-9
    rhs = right @ shares
    assert solve("lissa", matrix, rhs, rtol=1e-8, max_iter=5).sigma_max < 1.2  # the premise
    found = solve("lissa", matrix, rhs, rtol=1e-12, max_iter=4000)
    assert found.converged
    assert found.sigma_max > 1.5
    assert relative(found.x, torch.linalg.solve(matrix, rhs)) < 1e-6


@pytest.mark.mostly_slow(4)
@pytest.mark.parametrize("solver", ITERATIVE)
@pytest.mark.parametrize("sigma", [1.0, 1e2, 1e4])
def test_the_size_of_the_hessian_does_not_matter(solver: str, sigma: float) -> None:
    """The paper's script starts with scale 1, and restarts with a larger one until it no longer diverges."""
    rhs = torch.randn(60, dtype=torch.float64)
    small, large = (solve(solver, scale * TALL, rhs, rtol=1e-9, max_iter=5000) for scale in (1.0, sigma))
    assert small.converged
    assert large.converged
    assert small.iterations == pytest.approx(large.iterations, rel=0.05, abs=2)  # the estimate of the size is random
    assert relative(large.x * sigma, small.x) < 1e-6


@pytest.mark.parametrize("solver", ITERATIVE)
def test_the_same_input_gives_the_same_bits(solver: str) -> None:
    rhs = torch.randn(60)
    first, second = (solve(solver, TALL.float(), rhs, seed=3, max_iter=20) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert first.residuals == second.residuals


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_a_right_hand_side_outside_of_the_range_gives_zero(solver: str) -> None:
    for matrix, rhs in ((TALL, torch.zeros(60, dtype=torch.float64)), (torch.zeros(5, 3), torch.ones(5))):
        found = solve(solver, matrix, rhs, damping=0.0, rtol=1e-6, max_iter=10, seed=0)
        assert found.converged
        assert not found.x.any()


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_numbers_raise(solver: str, bad: float) -> None:
    matrix, rhs = TALL.clone(), torch.randn(60, dtype=torch.float64)
    matrix[3, 4] = bad
    with pytest.raises(NonFiniteError, match="non-finite"):
        solve(solver, matrix, rhs, rtol=1e-6, max_iter=10)
    rhs[0] = bad
    with pytest.raises(NonFiniteError, match="right-hand side"):
        solve(solver, TALL, rhs, rtol=1e-6, max_iter=10)


@pytest.mark.parametrize("solver", ITERATIVE)
def test_shapes_that_do_not_fit_are_reported(solver: str) -> None:
    with pytest.raises(ConfigurationError, match=r"right-hand side .* \(60,\)"):
        solve(solver, TALL, torch.ones(59, dtype=torch.float64))
    with pytest.raises(ConfigurationError, match=r"start .* \(20,\)"):
        solve(solver, TALL, torch.ones(60, dtype=torch.float64), start=torch.ones(60, dtype=torch.float64))


@pytest.mark.parametrize("solver", ITERATIVE)
def test_an_operator_that_changes_between_products_is_reported(solver: str) -> None:
    class Restless(Matrix):
        def matvec(self, vectors: Tensor) -> Tensor:
            return super().matvec(vectors) if self.products < 20 else -super().matvec(vectors)

    class Noisy(Matrix):
        def matvec(self, vectors: Tensor) -> Tensor:
            return super().matvec(vectors) + 0.2 * torch.randn_like(self.matrix) @ vectors

    class Shuffled(Matrix):
        """Each product is independent of the previous one."""

        def matvec(self, vectors: Tensor) -> Tensor:
            return super().matvec(vectors)[torch.randperm(len(self.matrix))]

    try:  # it changes once and then stays: the test requires only that no result is called converged
        found = SOLVERS[solver](Restless(TALL), torch.randn(60, dtype=torch.float64), rtol=1e-12, max_iter=1000)
    except ConvergenceError:
        pass
    else:
        assert isinstance(found, Solution)
        assert not found.converged
        assert found.residual > 1e-3

    for operator in (Noisy(TALL), Shuffled(TALL)):
        with pytest.raises(ConvergenceError, match="not the same function"):
            SOLVERS[solver](operator, torch.randn(60, dtype=torch.float64), rtol=1e-12, max_iter=1000)


def test_dense_refuses_a_matrix_that_would_not_fit() -> None:
    operator = Matrix(torch.empty(100_000, 1_000, device="meta"))
    with pytest.raises(ConfigurationError, match="solver='lissa'"):
        to_matrix(operator)
    assert operator.products == 0


@pytest.mark.parametrize("matrix", [TALL, TALL.T])
def test_to_matrix_needs_as_many_products_as_the_shorter_side(matrix: Tensor) -> None:
    operator = Matrix(matrix)
    assert torch.equal(to_matrix(operator), matrix)
    assert operator.products == min(matrix.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Random batches
# ----------------------------------------------------------------------------------------------------------------------


def parts(noise: float) -> Tensor:
    base = with_singular_values(30, torch.linspace(1, 0.5, 8, dtype=torch.float64))
    return base + noise * torch.randn(16, 30, 8, dtype=torch.float64)


def test_stochastic_lissa_finds_the_solution_of_the_mean() -> None:
    """With the same batch for both factors, the solution would be that of ``E[BᵢᵀBᵢ]``, with a ridge from the noise."""
    operator = Mean(parts(0.2))
    rhs = torch.randn(30, dtype=torch.float64)
    found = stochastic_lissa(operator, rhs, rtol=0.1, max_iter=4000)
    assert isinstance(found, Solution)
    exact = torch.linalg.pinv(operator.matrix) @ rhs
    second_moment = torch.stack([part.T @ part for part in operator.parts]).mean(0)
    biased = torch.linalg.solve(second_moment, operator.matrix.T @ rhs)
    assert relative(found.x, exact) < 0.1
    assert relative(biased, exact) > 0.2  # the condition of this test
    assert found.converged
    assert found.iterations == 4000


def test_repeats_average_out_the_noise() -> None:
    operator = Mean(parts(0.3))
    rhs = torch.randn(30, dtype=torch.float64)
    exact = torch.linalg.pinv(operator.matrix) @ rhs

    def error(repeats: int) -> float:
        errors = []
        for seed in range(6):
            found = stochastic_lissa(operator, rhs, max_iter=150, repeats=repeats, seed=seed)
            assert isinstance(found, Solution)
            errors.append(relative(found.x, exact))
        return sum(errors) / len(errors)

    assert error(8) < 0.75 * error(1)


def test_a_stochastic_solve_that_is_too_noisy_is_not_converged() -> None:
    found = stochastic_lissa(Mean(parts(1.0)), torch.randn(30, dtype=torch.float64), rtol=1e-6, max_iter=20)
    assert isinstance(found, Solution)
    assert found.status is Status.MAX_ITER
    assert len(found.residuals) == 2


def test_stochastic_lissa_with_one_batch_is_deterministic_and_repeats_by_its_seed() -> None:
    operator = Mean(TALL[None])
    rhs = torch.randn(60, dtype=torch.float64)
    found = stochastic_lissa(operator, rhs, rtol=1e-3, max_iter=2000)
    assert isinstance(found, Solution)
    assert relative(found.x, torch.linalg.pinv(TALL) @ rhs) < 1e-2
    noisy = Mean(parts(0.2))
    rhs = torch.randn(30, dtype=torch.float64)
    first, second, other = (stochastic_lissa(noisy, rhs, max_iter=20, seed=seed) for seed in (1, 1, 2))
    assert isinstance(first, Solution)
    assert isinstance(second, Solution)
    assert isinstance(other, Solution)
    assert torch.equal(first.x, second.x)
    assert not torch.equal(first.x, other.x)


def test_a_stochastic_solve_that_diverges_raises() -> None:
    """One batch in forty has two hundred times the curvature. The few draws that set the scale miss it."""
    every = parts(0.0)[:1].repeat(40, 1, 1)
    every[7] *= 200
    with pytest.raises(ConvergenceError, match="larger `batch_size`"):
        stochastic_lissa(Mean(every), torch.randn(30, dtype=torch.float64), max_iter=2000)


def test_an_operator_without_draws_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="draw random batches"):
        stochastic_lissa(Matrix(TALL), torch.randn(60, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------------------
# The spectrum
# ----------------------------------------------------------------------------------------------------------------------


def test_the_extreme_eigenvalues_are_those_of_the_matrix() -> None:
    values = torch.cat([torch.linspace(-1, 1, 300), torch.tensor([9.0, 7.0, 5.0, -6.0, -4.0])]).double()
    found = spectrum(Matrix(symmetric_indefinite(values)), 3, steps=60)
    assert found.largest == pytest.approx([9.0, 7.0, 5.0], rel=1e-6)
    assert found.smallest[:2] == pytest.approx([-6.0, -4.0], rel=1e-6)
    assert found.largest == sorted(found.largest, reverse=True)
    assert found.smallest == sorted(found.smallest)


@pytest.mark.parametrize("negative", [0.0, 0.1, 0.4, 1.0])
def test_the_share_of_negative_eigenvalues_is_estimated(negative: float) -> None:
    size = 400
    values = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
    values[: round(negative * size)] *= -1
    found = spectrum(Matrix(symmetric_indefinite(values)), 2, probes=10)
    assert found.negative_share == pytest.approx(negative, abs=0.05)


def test_zeros_are_not_counted_as_negative() -> None:
    values = torch.cat([torch.tensor([3.0, -2.0, 1.0]), torch.zeros(97)])
    found = spectrum(Matrix(symmetric_indefinite(values.double())), 2)
    assert found.negative_share < 0.05
    assert found.zero_share > 0.9
    assert found.largest[0] == pytest.approx(3.0)
    assert found.smallest[0] == pytest.approx(-2.0)


# ----------------------------------------------------------------------------------------------------------------------
# Newton steps
# ----------------------------------------------------------------------------------------------------------------------

NEWTON = {"damping": 0.0, "relative": 0.0, "rtol": 1e-10, "max_iter": 50}
DEFINITE = symmetric_indefinite(torch.logspace(0, 2, 12, dtype=torch.float64))


@pytest.mark.parametrize(("damping", "share"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.3), (2.0, 0.3)])
def test_a_newton_step_minimises_the_damped_quadratic(damping: float, share: float) -> None:
    rhs = torch.arange(1.0, 13.0, dtype=torch.float64)
    operator = Matrix(DEFINITE)
    solution, bend = truncated_newton(operator, rhs, **{**NEWTON, "damping": damping, "relative": share})
    shift = damping + share * float((DEFINITE @ rhs).norm() / rhs.norm())
    truth = torch.linalg.solve(DEFINITE + shift * torch.eye(12, dtype=torch.float64), rhs)
    assert relative(solution.x, truth) < 1e-8
    assert bend == pytest.approx(float(truth @ DEFINITE @ truth), rel=1e-8)
    assert solution.status is Status.CONVERGED
    assert solution.hvps == solution.iterations + 1 == operator.products <= 16  # one product checks the residual
    assert solution.examples == 10 * solution.hvps
    assert 30.0 < solution.sigma_max <= 100.0  # an estimate from below


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("matrix", [DEFINITE, INDEFINITE], ids=["definite", "indefinite"])
def test_a_newton_step_that_ends_early_descends_and_reports_its_curvature(matrix: Tensor, most: int) -> None:
    rhs = torch.arange(1.0, len(matrix) + 1.0, dtype=torch.float64)
    solution, bend = truncated_newton(Matrix(matrix), rhs, **{**NEWTON, "max_iter": most})
    assert float(solution.x @ rhs) > 0
    assert bend == pytest.approx(float(solution.x @ matrix @ solution.x), rel=1e-9)
    assert solution.residual == pytest.approx(float((rhs - matrix @ solution.x).norm() / rhs.norm()), rel=1e-9)


def test_a_newton_step_stops_at_negative_curvature() -> None:
    rhs = torch.ones(7, dtype=torch.float64)
    solution, _ = truncated_newton(Matrix(INDEFINITE), rhs, **NEWTON)
    assert solution.status is Status.INDEFINITE
    assert not solution.converged
    downhill, bend = truncated_newton(Matrix(-DEFINITE), torch.ones(12, dtype=torch.float64), **NEWTON)
    assert downhill.status is Status.INDEFINITE
    assert downhill.iterations == 0
    assert relative(downhill.x / downhill.x.norm(), torch.ones(12, dtype=torch.float64) / 12**0.5) < 1e-12
    assert bend == pytest.approx(float(downhill.x @ -DEFINITE @ downhill.x), rel=1e-9)


@pytest.mark.parametrize("size", [1e-24, 1e20])
def test_a_newton_step_scales_with_tiny_and_huge_gradients(size: float) -> None:
    matrix, rhs = DEFINITE.float(), torch.ones(12)
    one, _ = truncated_newton(Matrix(matrix), rhs, **{**NEWTON, "rtol": 1e-4})
    other, _ = truncated_newton(Matrix(matrix), size * rhs, **{**NEWTON, "rtol": 1e-4})
    torch.testing.assert_close(other.x / size, one.x)


def test_a_newton_step_with_a_zero_gradient_is_zero() -> None:
    operator = Matrix(DEFINITE)
    solution, bend = truncated_newton(operator, torch.zeros(12, dtype=torch.float64), **NEWTON)
    assert not solution.x.any()
    assert (bend, operator.products) == (0.0, 0)
    flat, _ = truncated_newton(Matrix(torch.zeros(3, 3)), torch.ones(3), **NEWTON)
    assert torch.isfinite(flat.x).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_newton_step_refuses_non_finite_numbers(bad: float) -> None:
    rhs = torch.ones(12, dtype=torch.float64)
    with pytest.raises(NonFiniteError):
        truncated_newton(Matrix(DEFINITE * bad), rhs, **NEWTON)
    with pytest.raises(NonFiniteError):
        truncated_newton(Matrix(DEFINITE), rhs * bad, **NEWTON)
    with pytest.raises(ConfigurationError, match=r"\(12,\)"):
        truncated_newton(Matrix(DEFINITE), rhs[:5], **NEWTON)


def test_a_newton_step_reports_the_size_of_negative_curvature() -> None:
    options = {**NEWTON, "damping": 8.0, "max_iter": 1}
    solution, _ = truncated_newton(Matrix(-5.0 * torch.eye(3).double()), torch.ones(3).double(), **options)
    assert solution.sigma_max == pytest.approx(5.0)


def test_a_newton_step_reports_its_true_residual() -> None:
    """In float32, with a condition number of 1e5, the recursive residual is far from the true one."""
    matrix = symmetric_indefinite(torch.logspace(0, 5, 40, dtype=torch.float64)).float()
    rhs = torch.randn(40, generator=torch.Generator().manual_seed(0))
    solution, _ = truncated_newton(Matrix(matrix), rhs, **{**NEWTON, "rtol": 1e-6, "max_iter": 2000})
    true = float((rhs - matrix @ solution.x).norm() / rhs.norm())
    assert solution.residual == pytest.approx(true, rel=0.2)
    assert solution.status is not Status.CONVERGED


# ----------------------------------------------------------------------------------------------------------------------
# Symmetric solves
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_conjugate_gradients_solve_each_column_to_its_own_convergence(damping: float) -> None:
    basis = torch.linalg.eigh(DEFINITE).eigenvectors
    rhs = torch.stack([torch.arange(1.0, 13.0).double(), 5.0 * basis[:, 3], torch.zeros(12).double()], dim=1)
    operator = Matrix(DEFINITE)
    found = SOLVERS["cg"](operator, rhs, damping=damping, rtol=1e-10, max_iter=50, seed=0)
    truth = torch.linalg.solve(DEFINITE + damping * torch.eye(12, dtype=torch.float64), rhs)
    for column, solution in enumerate(found):
        torch.testing.assert_close(solution.x, truth[:, column], rtol=1e-7, atol=1e-10)
        assert solution.converged
        assert len(solution.residuals) == solution.iterations + 1
    assert found[1].iterations == 1  # an eigenvector needs one iteration,
    assert found[2].iterations == 0  # and a zero column none
    assert operator.products <= found[0].iterations + 1 + 3  # converged columns cost no more products


def test_conjugate_gradients_end_at_negative_curvature_and_need_a_square_matrix() -> None:
    solution = solve("cg", INDEFINITE, torch.ones(7, dtype=torch.float64), rtol=1e-10, max_iter=50, seed=0)
    assert solution.status is Status.INDEFINITE
    for options in ({"operator": Matrix(TALL)}, {"operator": Matrix(DEFINITE), "start": torch.zeros(12).double()}):
        rows = options["operator"].shape[0]
        with pytest.raises(ConfigurationError, match="square operator and no start"):
            SOLVERS["cg"](rhs=torch.ones(rows).double(), damping=0.0, rtol=1e-3, max_iter=5, seed=0, **options)


def decaying(size: int = 60, rank: int = 60) -> Tensor:
    values = torch.zeros(size, dtype=torch.float64)
    values[:rank] = torch.logspace(1, -6, rank, dtype=torch.float64)
    return symmetric_indefinite(values)


def test_a_sketch_of_a_matrix_of_low_rank_is_that_matrix() -> None:
    matrix = decaying(rank=8)
    found = low_rank(Matrix(matrix), 12)
    assert relative(found.basis @ torch.diag(found.values) @ found.basis.T, matrix) < 1e-9
    eye = torch.eye(len(found.values), dtype=torch.float64)
    torch.testing.assert_close(found.basis.T @ found.basis, eye, rtol=0, atol=1e-9)
    rows = torch.randn(5, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    damped = matrix + 0.1 * torch.eye(60, dtype=torch.float64)
    truth = torch.linalg.solve(damped, rows.T)
    assert relative(found.solve(rows.T, 0.1), truth) < 1e-9
    torch.testing.assert_close(found.quadratic(rows, 0.1), (rows.T * truth).sum(0), rtol=1e-9, atol=0)


def test_a_sketch_costs_its_rank_and_one_product_for_any_number_of_columns() -> None:
    matrix = decaying()
    rhs = torch.randn(60, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    operator = Matrix(matrix)
    found = SOLVERS["nystrom"](operator, rhs, damping=1e-2, rtol=1e-3, max_iter=40, seed=0)
    assert operator.products == 41
    truth = torch.linalg.solve(matrix + 1e-2 * torch.eye(60, dtype=torch.float64), rhs)
    errors = [relative(solution.x, truth[:, column]) for column, solution in enumerate(found)]
    assert max(errors) < 0.05
    assert all(abs(value) < 0.05 for value in (solution.residual for solution in found))
    (rough,) = [SOLVERS["nystrom"](Matrix(matrix), rhs[:, 0], damping=1e-2, rtol=1e-3, max_iter=5, seed=0)]
    assert rough.residual > 0.1  # and is not converged if the rank does not reach down to the damping
    assert not rough.converged


def test_a_sketch_in_float32_is_stable() -> None:
    matrix = decaying().float()
    found = low_rank(Matrix(matrix), 40)
    eye = torch.eye(len(found.values))
    torch.testing.assert_close(found.basis.T @ found.basis, eye, rtol=0, atol=1e-2)
    torch.testing.assert_close(
        found.values[:10].double(), torch.linalg.eigvalsh(decaying()).flip(0)[:10], rtol=1e-2, atol=0
    )


def test_a_sketch_refuses_unsupported_options() -> None:
    rhs = torch.ones(7, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match="`damping` above 0"):
        SOLVERS["nystrom"](Matrix(INDEFINITE), rhs, damping=0.0, rtol=1e-3, max_iter=5, seed=0)
    with pytest.raises(ConfigurationError, match="without negative eigenvalues"):
        SOLVERS["nystrom"](Matrix(INDEFINITE), rhs, damping=1.0, rtol=1e-3, max_iter=7, seed=0)
    assert not low_rank(Matrix(torch.zeros(7, 7)), 3).values.any()
    with pytest.raises(NonFiniteError):
        low_rank(Matrix(DEFINITE * float("nan")), 3)


@pytest.mark.parametrize("solver", BUILT_IN)
def test_a_solution_says_how_many_iterations_it_was_allowed(solver: str) -> None:
    """Also where the solver or a default chose the number, and in a record."""
    for given, expected in (({"max_iter": 7}, 7), ({}, 128 if solver == "nystrom" else 100)):
        solution = SOLVERS[solver](Mean(DEFINITE[None]), torch.ones(12, dtype=torch.float64), damping=30.0, **given)
        assert isinstance(solution, Solution)
        assert solution.max_iter == solution.summary()["max_iter"] == expected
        assert Solution.of_record(solution.record()).max_iter == expected
    old = {name: value for name, value in solution.record().items() if name != "max_iter"}
    assert Solution.of_record(old).max_iter is None


class OneByOne(Mean):
    """Multiplies each vector by itself, as the curvature does, so that its product has the same bits beside others."""

    def matvec(self, vectors: Tensor) -> Tensor:
        if vectors.ndim == 1:
            return super().matvec(vectors)
        return torch.stack([super(OneByOne, self).matvec(column.contiguous()) for column in vectors.T], dim=1)

    def rmatvec(self, vectors: Tensor) -> Tensor:
        if vectors.ndim == 1:
            return super().rmatvec(vectors)
        return torch.stack([super(OneByOne, self).rmatvec(column.contiguous()) for column in vectors.T], dim=1)

    def draw(self, seed: int) -> Matrix:
        part = torch.randint(len(self.parts), (), generator=torch.Generator().manual_seed(seed))
        return OneByOne(self.parts[part][None])


@pytest.mark.parametrize("solver", [*ITERATIVE, "stochastic_lissa", "cg"])
def test_a_solution_does_not_depend_on_what_is_solved_together(solver: str) -> None:
    """The right-hand sides have their weight at different singular values, so the scales need different iterations."""
    matrix = symmetric_indefinite(torch.logspace(0, 1, 40, dtype=torch.float64))
    matrices = matrix + 0.02 * torch.stack([matrix, -matrix])
    vectors = torch.linalg.eigh(matrix).eigenvectors
    weights = torch.stack([torch.logspace(0, decades, 40, dtype=torch.float64) for decades in (-3, -1, 0, 2)], dim=1)
    rhs, options = vectors @ (weights * torch.randn(40, 1, dtype=torch.float64)), {"rtol": 1e-9, "max_iter": 12}
    together = SOLVERS[solver](OneByOne(matrices), rhs, damping=0.5, **options)
    assert isinstance(together, list)
    for column, found in zip(rhs.T, together, strict=True):
        (alone,) = SOLVERS[solver](OneByOne(matrices), column[:, None], damping=0.5, **options)
        torch.testing.assert_close(found.x, alone.x, rtol=1e-9, atol=1e-11)
        assert (found.status, found.iterations) == (alone.status, alone.iterations)


# ----------------------------------------------------------------------------------------------------------------------
# Declarations
# ----------------------------------------------------------------------------------------------------------------------


def test_solvers_declare_what_they_need_and_support() -> None:
    def names(attribute: str) -> set[str]:
        return {name for name in BUILT_IN if getattr(SOLVERS[name], attribute)}

    assert names("requires_symmetric_psd") == {"cg", "nystrom"}
    assert names("shares_products_across_rhs") == names("requires_damping") == names("is_sketch") == {"nystrom"}
    assert names("requires_draws") == {"stochastic_lissa"}
    assert names("supports_start") == {*ITERATIVE, "stochastic_lissa"}
    assert names("supports_discrepancy") == {*ITERATIVE, "stochastic_lissa", "cg"}


@pytest.mark.parametrize("solver", BUILT_IN)
@pytest.mark.parametrize(
    ("attribute", "option"),
    [("supports_start", {"start": torch.zeros(12).double()}), ("supports_discrepancy", {"discrepancy": 0.1})],
)
def test_options_that_a_solver_does_not_declare_are_refused(
    solver: str, attribute: str, option: dict[str, object]
) -> None:
    operator, rhs = Mean(DEFINITE[None]), torch.ones(12, dtype=torch.float64)
    if getattr(SOLVERS[solver], attribute):
        assert torch.isfinite(SOLVERS[solver](operator, rhs, damping=1.0, **option).x).all()
        return
    (name,) = option
    with pytest.raises(ConfigurationError, match=rf"solver='{solver}' takes .*no `?{name}`?.*Leave `{name}`"):
        SOLVERS[solver](operator, rhs, damping=1.0, **option)
    assert operator.products == 0


def test_a_plain_function_can_be_registered_and_declares_nothing() -> None:
    solvers = SolverRegistry("solver")
    calls = []

    @solvers.register("mine")
    def mine(operator: LinearOperator, rhs: Tensor, *, damping: float, rtol: float, **others: object) -> object:
        calls.append(others)
        return dense(operator, rhs, damping=damping, rtol=rtol)

    found = solvers["mine"](Matrix(TALL), torch.ones(60, dtype=torch.float64), damping=0.5, max_iter=7)
    assert relative(found.x, dense(Matrix(TALL), torch.ones(60, dtype=torch.float64), damping=0.5).x) == 0
    assert calls == [{"max_iter": 7, "seed": 0, "discrepancy": 0.0}]  # and a warm start only if there is one
    assert callable(mine)  # it stays the function that it was
    assert not isinstance(mine, Solver)
    assert not solvers["mine"].requires_symmetric_psd
    assert not solvers["mine"].shares_products_across_rhs
    with pytest.raises(ConfigurationError, match="registered already"):
        solvers.register("mine")(mine)


def test_a_partial_of_a_solver_can_be_registered() -> None:
    solvers = SolverRegistry("solver")
    solvers.register("averaged")(partial(stochastic_lissa, repeats=3))
    found = solvers["averaged"](Mean(parts(0.2)), torch.randn(30, dtype=torch.float64), max_iter=20)
    assert found.iterations == 60


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_partial_of_a_solver_keeps_what_it_declares(name: str) -> None:
    solvers = SolverRegistry("solver")
    solvers.register("again")(partial(SOLVERS[name]))
    own = {"name", "_algorithm"}
    declared, expected = vars(solvers["again"]), vars(SOLVERS[name])
    assert {key: declared[key] for key in declared.keys() - own} == {
        key: expected[key] for key in expected.keys() - own
    }
    assert (solvers["again"].name, SOLVERS[name].name) == ("again", name)
    rectangular, rhs = Matrix(torch.randn(12, 5, dtype=torch.float64)), torch.ones(12, dtype=torch.float64)
    if SOLVERS[name].requires_symmetric_psd:
        with pytest.raises(ConfigurationError, match="solver='again' takes a square operator"):
            solvers["again"](rectangular, rhs, damping=1.0)


def test_a_partial_of_a_solver_binds_options_of_it_alone() -> None:
    solvers = SolverRegistry("solver")
    with pytest.raises(ConfigurationError, match="'slow' binds max_iter and seed, which each call gives"):
        solvers.register("slow")(partial(stochastic_lissa, max_iter=500, seed=1, repeats=2))
    with pytest.raises(ConfigurationError, match="'fixed' binds its operator or right-hand side"):
        solvers.register("fixed")(partial(stochastic_lissa, Matrix(DEFINITE)))
    assert not list(solvers)


def test_a_registered_solver_keeps_its_declarations() -> None:
    solvers = SolverRegistry("solver")
    solver = Solver(
        "spread", lambda operator, rhs, options: cg(operator, rhs, damping=options.damping), requires_symmetric_psd=True
    )
    solvers.register("spread")(solver)
    assert solvers["spread"] is solver
    with pytest.raises(ConfigurationError, match="solver='spread' takes a square operator"):
        solvers["spread"](Matrix(TALL), torch.ones(60, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------------------
# One meaning of damping
# ----------------------------------------------------------------------------------------------------------------------


class Declared(Mean):
    """A matrix that declares itself positive semi-definite. Every draw is the whole matrix."""

    positive_semidefinite = True

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix[None])

    def draw(self, seed: int) -> Declared:
        return self


SINGULAR = symmetric_indefinite(torch.cat([torch.logspace(0, -1, 8), torch.zeros(6)]).double())


def until_convergence(solver: str) -> dict[str, object]:
    iterations = {"plain_lissa": 60_000, "stochastic_lissa": 60_000, "nystrom": 14}
    return {"rtol": 1e-9, "max_iter": iterations.get(solver, 3000)}


@pytest.mark.mostly_slow(5)
@pytest.mark.parametrize("solver", BUILT_IN)
@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("matrix", [DEFINITE / 100, SINGULAR], ids=["definite", "singular"])
def test_every_solver_adds_the_damping_to_the_eigenvalues(matrix: Tensor, weight_decay: float, solver: str) -> None:
    eye = torch.eye(len(matrix), dtype=torch.float64)
    rhs = torch.randn(len(matrix), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    operator = Declared(matrix + weight_decay * eye)
    found = SOLVERS[solver](operator, rhs, damping=0.1, **until_convergence(solver))
    expected = torch.linalg.inv(matrix + (weight_decay + 0.1) * eye) @ rhs
    for column, solution in enumerate(found):
        assert relative(solution.x, expected[:, column]) < 1e-6
        assert solution.damping == 0.1
        # The value of the matrix. Conjugate gradients estimate it along their directions only, the first of which is g.
        g = rhs[:, column]
        least = float(g @ operator.matrix @ g / (g @ g)) if solver == "cg" else 0.9 * (1.0 + weight_decay)
        assert least * (1 - 1e-9) < solution.sigma_max < 1.1 * (1.0 + weight_decay)
        assert solution.unexplained < 1e-6
    if solver != "stochastic_lissa":  # which counts its own draws
        assert sum(solution.hvps for solution in found) == pytest.approx(operator.products, abs=2)


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_an_eigenvalue_of_an_indefinite_matrix_counts_by_its_magnitude(solver: str) -> None:
    """With a shift, a damping of 1 would turn the eigenvalue −1 into 0, and the system would be singular."""
    rhs = torch.ones(7, dtype=torch.float64)
    values, basis = torch.linalg.eigh(INDEFINITE)
    found = solve(solver, INDEFINITE, rhs, damping=1.0, rtol=1e-10, max_iter=5000)
    expected = basis @ (values / (values**2 + 1.0) * (basis.T @ rhs))
    assert relative(found.x, expected) < 1e-6


def test_operators_declare_whether_they_are_positive_semidefinite() -> None:
    psd, unknown = Declared(DEFINITE), Matrix(DEFINITE)
    some, others, units = torch.tensor([1, 4, 6]), torch.tensor([1, 4, 7]), torch.rand(12, dtype=torch.float64)
    yes = [
        Submatrix(psd, None, None),
        Submatrix(psd, some, some.clone()),
        Submatrix(psd, some, some).T,
        Scaled(psd, units, rows=True),
        Shifted(psd, 0.5),
        Combination((0.5, psd), (0.0, psd)),
        Scaled(Submatrix(psd, some, some), units[:3], rows=True),
        Combination((1.0, psd)).draw(0),
    ]
    no = [
        unknown,
        Submatrix(psd, None, some),
        Submatrix(psd, some, others),
        Submatrix(unknown, some, some),
        Scaled(psd, units),
        Scaled(unknown, units, rows=True),
        Shifted(unknown, 0.5),
        Combination((0.5, psd), (-0.1, psd)),
        Combination((0.5, psd), (0.1, unknown)),
    ]
    assert all(is_positive_semidefinite(operator) for operator in yes)
    assert not any(is_positive_semidefinite(operator) for operator in no)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_damped_system_is_shifted_if_the_matrix_allows_it(damping: float) -> None:
    for operator in (Declared(DEFINITE), Matrix(DEFINITE), Matrix(TALL)):
        system, ridge = damped_system(operator, damping)
        shifts = damping > 0 and isinstance(operator, Declared)
        assert ridge == (0.0 if shifts else damping)
        expected = operator.matrix + damping * torch.eye(12).double() if shifts else operator.matrix
        torch.testing.assert_close(to_matrix(system), expected)
