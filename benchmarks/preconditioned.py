"""Measures how many products EK-FAC saves as the preconditioner of "cg", "lsmr" and "lissa".

    python benchmarks/preconditioned.py --data path/to/FashionMNIST/raw [--nets mlp cnn]

Networks are trained for a few epochs. The system is `(G + D) x = q`: the Gauss-Newton matrix of training examples, a
damping, and the gradients of held-out queries. The damping is a share of the largest eigenvalue, or the default, which
is ten times that of EK-FAC for each layer. Each solver runs plainly for `--iterations`. Then it runs with EK-FAC, for
more and more iterations, until it is as near to the solution. There are two measures, as medians over queries: the
relative residual, and the error in the energy norm, relative to that of zero, which conjugate gradients minimise.

Prints a Markdown table.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evidence import say, table
from mnist import NETS, fit, load
from torch import Tensor
from torch.utils.data import Subset

from lightning_gif import SOLVERS, GIFCallback
from lightning_gif.curvature import CorrectedEKFAC, EKFACInverse, LissaEKFAC, LsmrEKFAC
from lightning_gif.curvature.corrected import DAMPING_MULTIPLE
from lightning_gif.curvature.ekfac import require_layers
from lightning_gif.curvature.methods import METHODS
from lightning_gif.curvature.solve import open_curvature
from lightning_gif.solvers.operators import Transformed
from lightning_gif.solvers.power_iteration import largest_eigenvalue

EXACT = 400
KINDS: dict[str, type[CorrectedEKFAC]] = {"cg": CorrectedEKFAC, "lsmr": LsmrEKFAC, "lissa": LissaEKFAC}
SHARES = {"1e-3": 1e-3, "1e-4": 1e-4, "1e-5": 1e-5, "the default": None}


def rows(net: str, data: Any, epochs: int, n_examples: int, n_queries: int, most: int) -> Iterator[list[str]]:
    """The rows of the table for a network, with up to ``most`` iterations."""
    callback = GIFCallback(method="if", curvature="ggn", solver="ekfac_cg", curvature_examples=n_examples)
    n_train = min(5000, len(data) - n_queries)
    train, held_out = (Subset(data, range(*ends)) for ends in ((n_train,), (n_train, n_train + n_queries)))
    fit(train, [callback], net=net, epochs=epochs)
    with callback.open_session(callback.settings, "batch") as session:
        objective = session.objective
        settings = replace(callback.settings, rtol=1e-12, max_iter=EXACT, unconverged="ignore")
        queries = objective.query_gradients(session.examples(held_out), per_example=True)
        layers, examples = require_layers(objective, settings, METHODS["if"]), session.train.sample(n_examples, 0)
        linearise = CorrectedEKFAC.linearise(objective, settings, n_examples)
        curvature = open_curvature(settings, objective, examples, weight_decay=0.0, linearise=linearise)
        largest = largest_eigenvalue(curvature, queries[0], most)
        for name, share in SHARES.items():
            damped = replace(settings, damping=None if share is None else share * largest)
            ekfac = EKFACInverse.of(objective, layers, examples, damped, lambda: None, DAMPING_MULTIPLE)

            def solved(kind: type[CorrectedEKFAC], iterations: int, ekfac: EKFACInverse = ekfac) -> Tensor:
                return kind(replace(settings, max_iter=iterations), curvature, ekfac, n_queries).ihvp(queries)[0].T

            system = Transformed(curvature, ekfac.dampings().to(queries), lambda vectors: vectors, takes_columns=True)
            measures = _residual(system, queries.T), _energy(system, solved(CorrectedEKFAC, EXACT))
            for solver, kind in KINDS.items():
                found = SOLVERS[solver](system, queries.T, rtol=1e-12, max_iter=most)
                assert isinstance(found, list)  # since there are columns
                plain = torch.stack([one.x for one in found], dim=1)
                each = 1 if SOLVERS[solver].requires_symmetric_psd else 2
                cells = [net, name, solver, str(each * most)]
                for measure in measures:
                    reached = measure(plain)
                    near = (k for k in range(1, most + 1) if measure(solved(kind, k)) <= reached)
                    least = next(near, None)
                    products = f"more than {each * most}" if least is None else str(each * least)
                    cells += [f"{reached:.2g}", products]
                say(" ".join(cells))
                yield cells


def _residual(system: Transformed, rhs: Tensor) -> Callable[[Tensor], float]:
    """The median relative residual of solutions ``(n, q)``."""

    def measure(found: Tensor) -> float:
        return float(((rhs - system.matvec(found)).norm(dim=0) / rhs.norm(dim=0)).median())

    return measure


def _energy(system: Transformed, exact: Tensor) -> Callable[[Tensor], float]:
    """The median error of solutions ``(n, q)`` in the energy norm."""

    def squares(vectors: Tensor) -> Tensor:
        return (vectors * system.matvec(vectors)).sum(0)

    def measure(found: Tensor) -> float:
        return float((squares(found - exact) / squares(exact)).clamp(min=0).sqrt().median())

    return measure


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--nets", nargs="+", default=["mlp", "cnn"], choices=list(NETS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--examples", type=int, default=1000, help="examples that the matrix is the mean over")
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=20, help="iterations without EK-FAC")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, _ = load(options.data)
    found = [
        row
        for net in options.nets
        for row in rows(net, data, options.epochs, options.examples, options.queries, options.iterations)
    ]
    header = ["network", "damping", "solver", f"products of {options.iterations} iterations"]
    header += ["their residual", "with EK-FAC", "their error in the energy norm", "with EK-FAC"]
    print(table(header, found))


if __name__ == "__main__":
    main()
