"""Measures the peak memory of products over 1,000, 10,000 and 60,000 examples of TinyNet, each in its own process.

    python benchmarks/memory.py --data path/to/MNIST/raw [--reference path/to/GIF]

Each cell is the peak of two products. Rows of ours differ in `memory`, the GiB that may be kept between products. The
paper's script keeps the graph of every batch. `no product` is a process that does everything except the products.

The peak is the largest resident set of the process after loading, including the dataset and PyTorch. It works on Linux
only, where the kernel's peak can be reset after loading. Prints a Markdown table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from mnist import TinyNet, load
from problem import load_reference
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import attach


def measure(options: Namespace) -> None:
    """Computes the products in this process, and prints its peak memory in MiB."""
    import lightning.pytorch as pl

    from lightning_gif.config import Settings
    from lightning_gif.curvature.solve import open_curvature
    from lightning_gif.data.examples import Examples
    from lightning_gif.objective.memory import bytes_to_keep
    from lightning_gif.objective.objective import Objective

    train, _ = load(options.data)
    model = TinyNet()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    dataset = TensorDataset(*(tensor[: options.examples] for tensor in train.tensors))
    loader = DataLoader(dataset, 256)
    callback = attach(trainer, model, train_dataloaders=loader)
    with Objective.open(trainer, model) as objective:
        examples = Examples.from_loader(loader, objective.prepare, batch_size=256)
        objective.learn_structure(examples)
        vector = torch.randn(objective.space.size)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is higher, and does not count
        if options.how == "reference":
            reference = load_reference(options.reference)
            # As in the paper's scripts: the mean over all batches, with the graph of each.
            loss = sum(
                torch.nn.functional.cross_entropy(model.net(x), y, reduction="sum")
                for x, y in (batch.data for batch in examples.batches())
            ) / len(examples)
            for _ in range(2):
                reference.hvp(model.net, loss, vector)
        elif options.how != "base":
            settings: Settings = callback.settings.override({"memory": float(options.how)})
            held = examples.cached(bytes_to_keep(settings, objective))
            curvature = open_curvature(settings, objective, held)
            for _ in range(2):
                curvature.matvec(vector)
    marks = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps(int(marks["VmHWM"].split()[0]) / 1024))


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--reference", type=Path, help="checkout of the paper's scripts (hslyu/GIF)")
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 10_000, 60_000], help="numbers of examples")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.0, 0.25, 2.0], help="values of `memory`, in GiB")
    parser.add_argument("--how", help="measure only this row, in this process (used internally)")
    parser.add_argument("--examples", type=int, default=1000, help="number of examples, for --how")
    options = parser.parse_args()
    if options.how:
        measure(options)
        return
    names = {"base": "no product", **{str(budget): f"ours, `memory={budget:g}`" for budget in options.budgets}}
    if options.reference:
        names["reference"] = "the paper's script"
    print("| peak memory (MiB) | " + " | ".join(f"{count:,} examples" for count in options.counts) + " |")
    print("| --- |" + " --- |" * len(options.counts))
    for how, name in names.items():
        cells = []
        for count in options.counts:
            command = [sys.executable, __file__, "--data", str(options.data), "--how", how, "--examples", str(count)]
            command += ["--reference", str(options.reference)] if options.reference else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.strip().splitlines()
            cells.append(f"{json.loads(lines[-1]):.0f}" if done.returncode == 0 else f"killed ({done.returncode})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
