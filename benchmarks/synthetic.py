"""Measures the cost and the accuracy of each solver on synthetic indefinite Hessians with a known spectrum.

    python benchmarks/synthetic.py [--reference path/to/GIF]

`H` is symmetric, 600 x 600, in float64. It has eigenvalues of both signs. Their magnitudes are spaced evenly on a
logarithmic scale from σ_max down to σ_max / condition. Each `H` gives two least-squares problems: `A` is 60 random
columns of `H`, or all of `H`. The right-hand side is `A x` for a normally distributed `x`. With 60 columns it also has
noise outside the range of `A`, of 1 % of its norm.

The first table counts Hessian-vector products until the relative normal-equation residual is `--rtol`. If the
iterations run out before, the cell has the residual and the status.

The second table has the relative error of the solution after a number of products. This number includes the products
for the scale and for the check of the solution. `dense` has no solution before all of its products. Directions of small
curvature hardly show in the residual, so the error is far larger on an ill-conditioned problem.

With `--reference`, the paper's script runs unchanged on the same problems, with its default `tol` and `step` and our
number of iterations. It begins with a scale `c` of 1, and restarts with `c + 0.5` whenever its iterates grow. They stop
growing for `c` above 1/√2 of the largest singular value of `A`, so its cost grows with σ_max. The script has its own
stopping rule, so its residual is printed as well. A run is stopped after `--most-products` products.

Prints two Markdown tables, and then all numbers as one line of JSON.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from problem import load_reference
from torch import Tensor, nn

from lightning_gif import SOLVERS
from lightning_gif.solvers.operators import Submatrix
from lightning_gif.solvers.solution import Solution

_NOISE = 0.01


class Matrix:
    """A symmetric matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.products = self.examples = 0
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    def matvec(self, vectors: Tensor) -> Tensor:
        self.products += 1 if vectors.ndim == 1 else vectors.shape[1]
        return self.matrix @ vectors

    rmatvec = matvec


@dataclass
class Problem:
    """``min_x ‖H[:, S] x − g‖``.

    Attributes:
        name: ``"columns"`` or ``"full"``.
        sigma_max: The largest magnitude of an eigenvalue of ``H``.
        stated: The condition number of ``H``, by construction.
        condition: The condition number of ``A = H[:, S]``, computed.
        hessian: The matrix ``H``, ``(p, p)``.
        positions: The columns ``S``, sorted, ``(k,)``.
        gradient: The right-hand side ``g``, ``(p,)``.
        exact: The least-squares solution, ``(k,)``.
    """

    name: str
    sigma_max: float
    stated: float
    condition: float
    hessian: Tensor
    positions: Tensor
    gradient: Tensor
    exact: Tensor

    def operator(self) -> Submatrix:
        return Submatrix(Matrix(self.hessian), None, self.positions)

    def residual(self, x: Tensor) -> float:
        """The relative normal-equation residual of a solution."""
        a = self.hessian[:, self.positions]
        return float((a.T @ (self.gradient - a @ x)).norm() / (a.T @ self.gradient).norm())

    def error(self, x: Tensor) -> float:
        return float((x - self.exact).norm() / self.exact.norm())


def problems(sigma_max: float, condition: float, size: int, columns: int, seed: int) -> Iterator[Problem]:
    """The two problems of one spectrum. All spectra use the same random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(size, size)).Q
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    values = signs * sigma_max * torch.logspace(0, -1, size, base=condition, dtype=torch.float64)
    hessian = (basis * values) @ basis.T
    hessian = (hessian + hessian.T) / 2
    some = torch.randperm(size, generator=generator)[:columns].sort().values
    for name, positions in (("columns", some), ("full", torch.arange(size))):
        a = hessian[:, positions]
        gradient = a @ normal(len(positions))
        if len(positions) < size:
            noise, range_of_a = normal(size), torch.linalg.qr(a).Q
            noise -= range_of_a @ (range_of_a.T @ noise)
            gradient += _NOISE * gradient.norm() * noise / noise.norm()
        singular = torch.linalg.svdvals(a)
        exact = torch.linalg.lstsq(a, gradient[:, None], driver="gelsd").solution[:, 0]
        yield Problem(
            name, sigma_max, condition, float(singular[0] / singular[-1]), hessian, positions, gradient, exact
        )


def solve(solver: str, problem: Problem, **options: Any) -> Solution:
    found = SOLVERS[solver](problem.operator(), problem.gradient, **options)
    assert isinstance(found, Solution)
    return found


def within(solver: str, problem: Problem, budget: int) -> Solution | None:
    """The solution of a solver after at most ``budget`` products; ``None`` if it has none by then."""
    if solver == "dense" and len(problem.positions) > budget:
        return None
    steps = budget // 2
    while steps > 0:
        found = solve(solver, problem, rtol=1e-14, max_iter=steps)
        if found.hvps <= budget:
            return found
        steps -= (found.hvps - budget + 1) // 2
    return None


class QuadraticNet(nn.Module):
    """A network whose loss has a given Hessian, as the paper's script needs one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def loss(self, hessian: Tensor) -> Tensor:
        return self.theta @ (hessian @ self.theta) / 2


class TooManyProducts(Exception):
    """Raised to stop a run of the paper's script."""


def run_reference(reference: Any, problem: Problem, max_iter: int, most: int) -> dict[str, Any]:
    """The products, restarts and errors of the paper's script."""
    products = starts = 0
    product, gradient = reference.hvp, reference.compute_gradient

    def counted_product(*arguments: Any, **options: Any) -> Any:
        nonlocal products
        if products >= most:
            raise TooManyProducts
        products += 1
        return product(*arguments, **options)

    def counted_gradient(*arguments: Any, **options: Any) -> Any:
        nonlocal starts
        starts += 1  # it computes the target's gradient once at each start
        return gradient(*arguments, **options)

    net = QuadraticNet(len(problem.gradient))
    reference.hvp, reference.compute_gradient = counted_product, counted_gradient
    found: Tensor | None = None
    try:
        found = reference.generalized_influence(
            net, net.loss(problem.hessian), net.theta @ problem.gradient, problem.positions.numpy(), max_iter=max_iter
        ).detach()
    except TooManyProducts:
        pass
    finally:
        reference.hvp, reference.compute_gradient = product, gradient
    return {
        "returned": found is not None,
        "products": products,
        "restarts": starts - 1,
        "scale": 1 + 0.5 * (starts - 1),
        "residual": None if found is None else problem.residual(found),
        "error": None if found is None else problem.error(found),
    }


def measure(problem: Problem, options: Namespace, reference: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "problem": problem.name,
        "sigma_max": problem.sigma_max,
        "condition_of_hessian": problem.stated,
        "condition": problem.condition,
        "solvers": {},
    }
    for solver in options.solvers:
        found = solve(solver, problem, rtol=options.rtol, max_iter=options.max_iter)
        budgets = {budget: within(solver, problem, budget) for budget in options.budgets}
        record["solvers"][solver] = {
            "status": str(found.status),
            "products": found.hvps,
            "residual": found.residual,
            "error": problem.error(found.x),
            "errors": {budget: None if best is None else problem.error(best.x) for budget, best in budgets.items()},
        }
    if reference is not None:
        record["reference"] = run_reference(reference, problem, options.max_iter, options.most_products)
    return record


def spent(found: dict[str, Any]) -> str:
    if found["status"] == "converged":
        return str(found["products"])
    return f"— ({found['residual']:.1g}, {found['status']})"


def spent_by_reference(found: dict[str, Any]) -> str:
    count = str(found["products"]) if found["returned"] else f">{found['products']}"
    end = f", residual {found['residual']:.1g}" if found["returned"] else ""
    return f"{count} ({found['restarts']} restarts, c = {found['scale']:g}{end})"


def errors(found: dict[str, Any]) -> str:
    return " / ".join("—" if error is None else f"{error:.2g}" for error in found["errors"].values())


def table(title: str, heads: list[str], rows: list[list[str]]) -> None:
    first = ["columns", "σ_max", "condition of `H`", "condition of `A`"]
    print(f"{title}\n\n| " + " | ".join(first + heads) + " |")
    print("|" + " --- |" * len(first + heads))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reference", type=Path, help="checkout of the paper's scripts (hslyu/GIF)")
    parser.add_argument("--size", type=int, default=600, help="size of `H`")
    parser.add_argument("--columns", type=int, default=60, help="columns of the smaller problem")
    parser.add_argument("--sigma", type=float, nargs="+", default=[1.0, 1e2, 1e4], help="values of σ_max")
    parser.add_argument("--condition", type=float, nargs="+", default=[1e2, 1e4, 1e6], help="condition numbers of `H`")
    parser.add_argument(
        "--solvers", nargs="+", default=["lsmr", "cgls", "lissa", "plain_lissa", "dense"], help="our solvers"
    )
    parser.add_argument("--rtol", type=float, default=1e-2, help="relative residual to reach")
    parser.add_argument("--max-iter", type=int, default=500, help="maximal iterations, also of the paper's script")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[50, 200], help="numbers of products in the second table"
    )
    parser.add_argument(
        "--most-products", type=int, default=20_000, help="number of products after which the paper's script is stopped"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the problems")
    options = parser.parse_args()
    reference = load_reference(options.reference) if options.reference else None

    records = [
        measure(problem, options, reference)
        for condition in options.condition
        for sigma in options.sigma
        for problem in problems(sigma, condition, options.size, options.columns, options.seed)
    ]
    records.sort(key=lambda record: record["problem"])  # stable

    def rows(cells: Any) -> list[list[str]]:
        names = ("sigma_max", "condition_of_hessian", "condition")
        columns = {"columns": f"{options.columns} of {options.size}", "full": "all"}
        return [
            [columns[record["problem"]], *(f"{record[name]:.3g}" for name in names), *cells(record)]
            for record in records
        ]

    script = [] if reference is None else ["the paper's script"]
    table(
        f"Hessian-vector products to a residual of {options.rtol:g}",
        options.solvers + script,
        rows(
            lambda record: [
                *map(spent, record["solvers"].values()),
                *([spent_by_reference(record["reference"])] if script else []),
            ]
        ),
    )
    table(
        "Relative error after " + " / ".join(map(str, options.budgets)) + " products",
        options.solvers + (["the paper's script, at its end"] if script else []),
        rows(
            lambda record: [
                *map(errors, record["solvers"].values()),
                *(["—" if (e := record["reference"]["error"]) is None else f"{e:.2g}"] if script else []),
            ]
        ),
    )
    print(json.dumps({"torch": torch.__version__, "rtol": options.rtol, "max_iter": options.max_iter, "runs": records}))


if __name__ == "__main__":
    main()
