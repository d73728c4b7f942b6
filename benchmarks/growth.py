"""Measures what the memory of a query grows with: the size of EK-FAC's matrices, and the number of examples.

    python benchmarks/growth.py [--widths 300 2000] [--counts 200000 800000]

- parameters: a query by EK-FAC on the perceptrons of `scaling.py`. The matrices are those of all layers with `i` inputs
  (and the bias) and `o` outputs: `4 (i² + o² + i o)` bytes.
- examples: a query by a linear model of 6 parameters, on examples of two numbers.

Each row is measured in a process of its own. Memory is the peak during the call, over that before it, in MiB. The last
row of a table has the growth from the first row to the last one. Prints two Markdown tables.
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


def measured(model: pl.LightningModule, dataset: TensorDataset, batch_size: int, **options: Any) -> dict[str, float]:
    """The peak memory of a query in bytes, over that before it, and its seconds."""
    trainer = pl.Trainer(
        accelerator="cpu",
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    attach(trainer, model, train_dataloaders=DataLoader(dataset, batch_size))
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
    trainer.influence(tuple(tensor[:2] for tensor in dataset.tensors), batch_size=batch_size, **options)
    seconds = time.process_time() - start
    done.set()
    watching.join()
    return {"peak": peak - before, "seconds": seconds}


def of_width(width: int) -> dict[str, float]:
    model = Perceptron(width)
    layers = [layer for layer in model.net if isinstance(layer, nn.Linear)]
    sides = [(layer.in_features + 1, layer.out_features) for layer in layers]
    matrices = sum(4 * (i * i + o * o + i * o) for i, o in sides)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"size": count, "matrices": matrices, **measured(model, data(512), 32, solver="ekfac")}


def of_count(count: int) -> dict[str, float]:
    dataset = TensorDataset(torch.randn(count, 2), torch.randint(0, 2, (count,)))
    return {"size": count, **measured(Line(), dataset, 1024, memory=0.0, keep=10)}


def apart(kind: str, size: int) -> dict[str, float]:
    """A row that is measured in another process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--row", kind, str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[300, 2000], help="hidden widths, one network each")
    parser.add_argument("--counts", type=int, nargs="+", default=[200_000, 800_000], help="numbers of examples")
    parser.add_argument("--row", nargs=2, metavar=("KIND", "SIZE"), help="measure one row, for the command itself")
    options = parser.parse_args()
    if options.row:
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        kind, size = options.row
        print(json.dumps((of_width if kind == "width" else of_count)(int(size))))
        return
    rows = [apart("width", width) for width in options.widths]
    print("| parameters | matrices (MiB) | peak memory (MiB) | CPU seconds |\n| --- | --- | --- | --- |")
    for row in rows:
        numbers = f"{row['matrices'] / 2**20:.1f} | {row['peak'] / 2**20:.0f} | {row['seconds']:.1f}"
        print(f"| {row['size']:,} | {numbers} |")
    if len(rows) > 1:
        ratio = (rows[-1]["peak"] - rows[0]["peak"]) / (rows[-1]["matrices"] - rows[0]["matrices"])
        print(f"| growth | | {ratio:.1f} x the matrices | |")
    rows = [apart("count", count) for count in options.counts]
    print("\n| examples | peak memory (MiB) | CPU seconds |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {row['size']:,} | {row['peak'] / 2**20:.0f} | {row['seconds']:.1f} |")
    if len(rows) > 1:
        more = rows[-1]["size"] - rows[0]["size"]
        each = (rows[-1]["peak"] - rows[0]["peak"]) / more, 1e6 * (rows[-1]["seconds"] - rows[0]["seconds"]) / more
        print(f"| growth | {each[0]:.0f} bytes an example | {each[1]:.0f} µs an example |")


if __name__ == "__main__":
    main()
