"""Hessian-vector products and seconds to the residual that the paper's script reaches, on both TinyNet problems.

    python benchmarks/solve.py --data path/to/MNIST/raw path/to/FashionMNIST/raw [--reference path/to/GIF]

TinyNet, class 0 to be forgotten, 5 % of the parameters, over 256 and over 2048 retained examples. The script of the
paper runs as it is, with `max_iter=200`; every solver of ours then runs to the residual (of the normal equations,
relative) at which that ended. Without `--reference`, to 1e-2. Prints a Markdown table.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from typing import Any

import torch.nn.functional as F
from mnist import fit, load
from problem import Problem, load_reference, opened

from lightning_gif import SOLVERS, GIFCallback


def run_reference(reference: Any, problem: Problem, max_iter: int) -> tuple[float, int, float]:
    """Residual, products and seconds of the paper's script."""
    count = 0
    product = reference.hvp

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return product(*arguments, **options)

    x, y = problem.forget
    target = problem.share * F.cross_entropy(problem.net(x), y)
    reference.hvp = counted
    try:
        start = time.perf_counter()
        found = reference.generalized_influence(
            problem.net, problem.loss(), target, problem.positions.numpy(), tol=1e-9, max_iter=max_iter
        )
        seconds = time.perf_counter() - start
    finally:
        reference.hvp = product
    return problem.residual(found.detach()), count, seconds


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with four idx files each")
    parser.add_argument("--reference", type=Path, help="checkout of the paper's scripts")
    parser.add_argument("--examples", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--solvers", nargs="+", default=["lsmr", "cgls", "lissa"])
    parser.add_argument("--max-iter", type=int, default=200, help="steps of the paper's script, and most of ours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    reference = load_reference(options.reference) if options.reference else None

    print("| data | retained examples | solver | residual | Hessian-vector products | ratio | seconds | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for folder in options.data:
        train, _ = load(folder)
        trainer, model = fit(train, [GIFCallback()], epochs=options.epochs)
        for examples in options.examples:
            with opened(trainer, model, train, examples=examples) as problem:

                def row(*cells: Any, where: str = f"{folder.parent.name} | {examples}") -> None:
                    print(f"| {where} | " + " | ".join(map(str, cells)) + " |", flush=True)

                goal, base = 1e-2, None
                if reference is not None:
                    goal, *base = run_reference(reference, problem, options.max_iter)
                    row("the paper's script", f"{goal:.3g}", base[0], "1", f"{base[1]:.1f}", "1")
                for solver in options.solvers:
                    found = []
                    for _ in range(options.repeats):
                        start = time.perf_counter()
                        matrix = problem.matrix(problem.curvature())
                        solution: Any = SOLVERS[solver](matrix, problem.gradient, rtol=goal, max_iter=options.max_iter)
                        found.append(time.perf_counter() - start)
                    if not solution.converged:
                        row(solver, f"{solution.residual:.3g} ({solution.status})", solution.hvps, "", "", "")
                        continue
                    seconds = median(found)
                    ratios = ["", ""]
                    if base is not None:
                        ratios = [f"1/{base[0] / solution.hvps:.1f}", f"1/{base[1] / seconds:.1f}"]
                    row(solver, f"{solution.residual:.3g}", solution.hvps, ratios[0], f"{seconds:.1f}", ratios[1])


if __name__ == "__main__":
    main()
