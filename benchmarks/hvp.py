"""Measures one Hessian-vector product over 2048 examples of TinyNet: ours and those of other implementations.

    python benchmarks/hvp.py --data path/to/MNIST/raw [--reference path/to/GIF]

Prints a Markdown table of median seconds. All implementations take turns in one process. Seconds are relative to the
paper's script or, without `--reference`, to double backward. curvlinops is included if it is installed. Before the
measurement, the script checks that all products agree.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mnist import fit, load
from problem import load_reference, opened, timed
from torch import Tensor, nn

from lightning_gif import GIFCallback


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--reference", type=Path, help="checkout of the paper's scripts (hslyu/GIF)")
    parser.add_argument("--examples", type=int, default=2048, help="examples of a product")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each product")
    parser.add_argument("--epochs", type=int, default=1, help="training epochs")
    options = parser.parse_args()

    train, _ = load(options.data)
    trainer, model = fit(train, [GIFCallback()], epochs=options.epochs)
    with opened(trainer, model, train, examples=options.examples) as problem:
        vector = torch.randn(problem.objective.space.size, generator=torch.Generator().manual_seed(0))
        kept, anew = problem.curvature(), problem.curvature(memory=0)
        kept_ggn, anew_ggn = problem.curvature("ggn"), problem.curvature("ggn", memory=0)
        one_graph = problem.loss()

        def double_backward() -> Tensor:
            parameters = list(problem.net.parameters())
            gradient = torch.autograd.grad(problem.loss(), parameters, create_graph=True)
            flat = torch.cat([part.reshape(-1) for part in gradient])
            return torch.cat([part.reshape(-1) for part in torch.autograd.grad(flat, parameters, vector)])

        hessian: dict[str, Callable[[], Any]] = {
            "ours, first pass kept": lambda: kept.matvec(vector),
            "ours, nothing kept": lambda: anew.matvec(vector),
            "double backward, one batch": double_backward,
        }
        ggn: dict[str, Callable[[], Any]] = {
            "ours, Gauss-Newton, first pass kept": lambda: kept_ggn.matvec(vector),
            "ours, Gauss-Newton, nothing kept": lambda: anew_ggn.matvec(vector),
        }
        base = "double backward, one batch"
        if options.reference:
            reference = load_reference(options.reference)
            base = "the paper's script"
            hessian[base] = lambda: reference.hvp(problem.net, one_graph, vector)
        try:
            import curvlinops
        except ModuleNotFoundError:
            print("curvlinops is not installed, so its row is left out.")
        else:
            data = [(batch.data[0], batch.data[1]) for batch in problem.retained.batches()]
            arguments = (problem.net, nn.CrossEntropyLoss(), list(problem.net.parameters()), data)
            theirs = curvlinops.HessianLinearOperator(*arguments, check_deterministic=False)
            theirs_ggn = curvlinops.GGNLinearOperator(*arguments, check_deterministic=False)
            hessian["curvlinops"] = lambda: theirs @ vector
            ggn["curvlinops, Gauss-Newton"] = lambda: theirs_ggn @ vector

        for group in (hessian, ggn):
            products = [torch.as_tensor(function()).detach().flatten() for function in group.values()]
            for name, product in zip(group, products, strict=True):
                torch.testing.assert_close(product, products[0], rtol=1e-2, atol=1e-4, msg=f"{name} differs")

        seconds = timed({**hessian, **ggn}, options.repeats)
        print(f"| product over {options.examples} examples | seconds | relative to {base} |")
        print("| --- | --- | --- |")
        for name, value in seconds.items():
            print(f"| {name} | {value:.3f} | {value / seconds[base]:.2f} |")


if __name__ == "__main__":
    main()
