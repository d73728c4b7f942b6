"""Measures the cost of a product and of a solve for growing numbers of parameters and of target parameters.

    python benchmarks/scaling.py [--plot scaling.png]

The networks are multilayer perceptrons on 256 random examples of MNIST's shape. Products are compared with one forward
and backward pass, since an exact Hessian-vector product costs at least two of these. Prints two Markdown tables.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from problem import timed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, attach
from lightning_gif.curvature.solve import open_curvature
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective
from lightning_gif.solvers import lsmr
from lightning_gif.solvers.operators import Submatrix


class Perceptron(pl.LightningModule):
    def __init__(self, width: int, depth: int = 1) -> None:
        super().__init__()
        hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
        self.net = nn.Sequential(nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def data(examples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(examples) % 10
    centres = torch.randn(10, 784, generator=generator)
    return TensorDataset(centres[y] + torch.randn(examples, 784, generator=generator), y)


def measure(width: int, ratio: float, examples: int, repeats: int) -> dict[str, float]:
    """The seconds of a pass, of a product and of a solve, the products of the solve, and the numbers of parameters."""
    torch.manual_seed(0)
    model, dataset = Perceptron(width), data(examples)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(10):  # away from the initial weights
        optimizer.zero_grad()
        model.training_step(dataset.tensors, 0).backward()
        optimizer.step()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    callback: GIFCallback = attach(trainer, model, train_dataloaders=DataLoader(dataset, examples))
    with Objective.open(trainer, model) as objective:
        held = Examples.from_batch(dataset.tensors, objective.prepare, batch_size=examples)
        objective.learn_structure(held)
        vector = torch.randn(objective.space.size)
        kept = open_curvature(callback.settings, objective, held)
        unkept = open_curvature(callback.settings.override({"memory": 0.0}), objective, held)
        parameters = list(model.parameters())

        def passes() -> None:
            torch.autograd.grad(model.training_step(dataset.tensors, 0), parameters)

        seconds = timed(
            {"pass": passes, "kept": lambda: kept.matvec(vector), "unkept": lambda: unkept.matvec(vector)}, repeats
        )
        count = max(1, round(ratio * objective.space.size))
        positions = torch.randperm(objective.space.size, generator=torch.Generator().manual_seed(0))[:count]
        of_one = Examples.from_batch(tuple(t[:1] for t in dataset.tensors), objective.prepare, batch_size=1)
        start = time.perf_counter()
        matrix = Submatrix(kept, None, positions.sort().values)
        solution: Any = lsmr(matrix, objective.gradient(of_one), rtol=1e-2, max_iter=100)
        seconds["solve"] = time.perf_counter() - start
    return {**seconds, "p": objective.space.size, "k": count, "products": solution.hvps}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[12, 64, 300, 1000, 2800], help="hidden widths, one network each"
    )
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.001, 0.01, 0.05, 0.1, 0.3, 1.0], help="shares of targets"
    )
    parser.add_argument("--width", type=int, default=300, help="hidden width of the network in the table of ratios")
    parser.add_argument("--examples", type=int, default=256, help="examples of a product")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each product")
    parser.add_argument("--plot", type=Path, help="file for a plot of both tables")
    options = parser.parse_args()

    by_size = [measure(width, 0.05, options.examples, options.repeats) for width in options.widths]
    print(
        "| parameters | forward and backward (ms) | product, first pass kept | product, nothing kept |"
        " products per solve | solve (s) |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for row in by_size:
        multiples = f"{row['kept'] / row['pass']:.1f} x | {row['unkept'] / row['pass']:.1f} x"
        print(f"| {row['p']:,} | {1e3 * row['pass']:.1f} | {multiples} | {row['products']} | {row['solve']:.2f} |")
    by_ratio = [measure(options.width, ratio, options.examples, options.repeats) for ratio in options.ratios]
    print("\n| targets | share (%) | products per solve | solve (s) |")
    print("| --- | --- | --- | --- |")
    for row in by_ratio:
        print(f"| {row['k']:,} | {100 * row['k'] / row['p']:.3g} | {row['products']} | {row['solve']:.2f} |")
    if options.plot:
        plot(by_size, by_ratio, options.plot)


def plot(by_size: list[dict[str, float]], by_ratio: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for key, name in (("unkept", "product, nothing kept"), ("kept", "product, first pass kept")):
        left.loglog([row["p"] for row in by_size], [row[key] for row in by_size], "o-", label=name)
    limit = [row["pass"] for row in by_size]
    left.loglog([row["p"] for row in by_size], limit, "k--", label="limit: one forward and backward pass")
    left.set_xlabel("parameters p")
    left.set_ylabel("seconds")
    left.legend()
    right.semilogx([row["k"] for row in by_ratio], [row["products"] for row in by_ratio], "o-")
    right.set_xlabel(f"targets k, of {by_ratio[0]['p']:,} parameters")
    right.set_ylabel("products to a residual of 1e-2 (lsmr)")
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
