"""Measures what the time and the memory of a query grow with.

    python benchmarks/growth.py [--widths 300 2000x2] [--counts 200000 800000] [--queries 1 100] [--plot growth.png]

- parameters: a query by EK-FAC on the perceptrons of `scaling.py`. `2000x2` is one with two layers from 2000 to 2000
  units, and `2000` one with one of them. The matrices are those of all layers with `i` inputs (and the bias) and `o`
  outputs: `4 (i² + o² + i o)` bytes.
- examples: a query by a linear model of 6 parameters, on examples of two numbers.
- queries: scores by EK-FAC on the smallest perceptron, each query on its own.

Each row is measured in a process of its own. Memory is the peak during the call, over that before it, in MiB. The limit
is one forward and backward pass over the training examples, which no score of all of them can do without. The last row
of the first two tables has the growth from their first row to the last one. Prints Markdown tables.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
import torch.nn.functional as F
from scaling import Perceptron, data
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import attach


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def measured(
    model: pl.LightningModule, dataset: TensorDataset, batch_size: int, queries: int = 2, **options: Any
) -> dict[str, float]:
    """The peak memory of a call in bytes, over that before it, its seconds, and those of a pass over the data."""
    trainer = pl.Trainer(
        accelerator="cpu",
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    loader = DataLoader(dataset, batch_size)
    attach(trainer, model, train_dataloaders=loader)
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    start = time.process_time()
    chosen = torch.arange(queries) % len(dataset)
    trainer.influence(tuple(tensor[chosen] for tensor in dataset.tensors), batch_size=batch_size, **options)
    seconds = time.process_time() - start
    done.set()
    watching.join()
    start, parameters = time.process_time(), list(model.parameters())
    for batch in loader:
        torch.autograd.grad(model.training_step(batch, 0), parameters)
    return {"peak": peak - before, "seconds": seconds, "limit": time.process_time() - start}


def of_width(size: str) -> dict[str, float]:
    model = Perceptron(*map(int, size.split("x")))
    layers = [layer for layer in model.net if isinstance(layer, nn.Linear)]
    sides = [(layer.in_features + 1, layer.out_features) for layer in layers]
    matrices = sum(4 * (i * i + o * o + i * o) for i, o in sides)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"size": count, "matrices": matrices, **measured(model, data(512), 32, solver="ekfac")}


def of_count(size: str) -> dict[str, float]:
    count = int(size)
    dataset = TensorDataset(torch.randn(count, 2), torch.randint(0, 2, (count,)))
    return {"size": count, **measured(Line(), dataset, 1024, memory=0.0, keep=10)}


def of_queries(size: str) -> dict[str, float]:
    count = int(size)
    options: dict[str, Any] = {"per_example": True, "solver": "ekfac", "keep": 10}
    return {"size": count, **measured(Perceptron(100), data(1000), 100, count, **options)}


KINDS = {"width": of_width, "count": of_count, "queries": of_queries}


def apart(kind: str, size: str) -> dict[str, float]:
    """A row that is measured in another process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", kind, size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", default=["300", "2000x2"], help="hidden widths, one network each")
    parser.add_argument("--counts", nargs="+", default=["200000", "800000"], help="numbers of examples")
    parser.add_argument("--queries", nargs="+", default=["1", "100"], help="numbers of queries")
    parser.add_argument("--plot", type=Path, help="file for a plot of the tables")
    parser.add_argument("--row", nargs=2, metavar=("KIND", "SIZE"), help="measure one row, for the command itself")
    options = parser.parse_args()
    if options.row:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        kind, size = options.row
        print(json.dumps(KINDS[kind](size)))
        return
    found = {
        "parameters": [apart("width", width) for width in options.widths],
        "examples": [apart("count", count) for count in options.counts],
        "queries": [apart("queries", count) for count in options.queries],
    }
    for name, rows in found.items():
        of_size = name == "parameters"
        print(f"| {name} | {'matrices (MiB) | ' * of_size}peak memory (MiB) | CPU seconds | limit |")
        print("| --- " * (4 + of_size) + "|")
        for row in rows:
            matrices = f"{row['matrices'] / 2**20:.1f} | " if of_size else ""
            times = f"{row['seconds']:.1f} | {row['limit']:.2g}"
            print(f"| {row['size']:,} | {matrices}{row['peak'] / 2**20:.0f} | {times} |")
        if len(rows) > 1 and name != "queries":
            print(_growth(name, rows[0], rows[-1]))
        print(flush=True)
    if options.plot:
        plot(found, options.plot)


def _growth(name: str, first: dict[str, float], last: dict[str, float]) -> str:
    """The last row of a table."""
    memory = last["peak"] - first["peak"]
    if name == "parameters":
        return f"| growth | | {memory / (last['matrices'] - first['matrices']):.1f} x the matrices | | |"
    more = last["size"] - first["size"]
    seconds = 1e6 * (last["seconds"] - first["seconds"]) / more
    return f"| growth | {memory / more:.0f} bytes an example | {seconds:.0f} µs an example | |"


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(12, 6), layout="constrained", sharex="col")
    for (name, rows), (above, below) in zip(found.items(), axes.T, strict=True):
        sizes = [row["size"] for row in rows]
        above.loglog(sizes, [row["seconds"] for row in rows], "o-", label="scores")
        above.loglog(sizes, [row["limit"] for row in rows], "k--", label="limit: one forward and backward pass")
        below.loglog(sizes, [max(row["peak"] / 2**20, 1) for row in rows], "o-")
        below.set_xlabel(name)
    axes[0, 0].set_ylabel("CPU seconds")
    axes[1, 0].set_ylabel("peak memory (MiB)")
    axes[0, 0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
