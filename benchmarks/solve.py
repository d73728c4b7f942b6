"""Measures the Hessian-vector products and seconds that solvers need for the residual of the paper's script.

    python benchmarks/solve.py --data path/to/MNIST/raw path/to/FashionMNIST/raw [--reference path/to/GIF]

The problem is the removal of class 0 from TinyNet, with 5 % of the parameters as targets and 256 or 2048 retained
examples. The paper's script runs unchanged with `max_iter=200`. Each of our solvers then runs until it reaches the
relative normal-equation residual at which the script ended. Without `--reference` it runs to 1e-2. Prints a Markdown
table.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import median
from typing import Any

import torch.nn.functional as F
from mnist import fit, load
from problem import Problem, load_reference, opened

from lightning_gif import SOLVERS, GIFCallback


def run_reference(reference: Any, problem: Problem, max_iter: int) -> tuple[float, int, float]:
    """The residual, products and seconds of the paper's script."""
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
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders with four gzipped idx files each")
    parser.add_argument("--reference", type=Path, help="checkout of the paper's scripts (hslyu/GIF)")
    parser.add_argument("--examples", type=int, nargs="+", default=[256, 2048], help="retained examples")
    parser.add_argument("--solvers", nargs="+", default=["lsmr", "cgls", "lissa"], help="our solvers")
    parser.add_argument(
        "--max-iter", type=int, default=200, help="maximal iterations of the paper's script and of our solvers"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each of our solvers; seconds are medians")
    parser.add_argument("--epochs", type=int, default=2, help="training epochs")
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
