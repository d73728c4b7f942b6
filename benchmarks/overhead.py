"""Measures what the callback costs training: the time of an optimizer step, and the memory of its caches.

    python benchmarks/overhead.py [--steps 300] [--net tinynet --net resnet]

The data are random images of MNIST's size in batches of 128, on one thread. Three kinds of steps take turns in one fit:

- plain: without the callback;
- idle: with the callback, at a step where it gathers no statistics;
- gathering: with the callback, at a step where it gathers statistics.

A step lasts from its first hook to its last, without reading the batch. Ratios are medians over neighbouring steps.
The ratio of an epoch is computed for the 469 steps of an epoch of MNIST, of which 23 gather statistics. Picking the
targets, once an epoch, is measured separately. Prints a Markdown table.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

import lightning.pytorch as pl
import torch
from mnist import NETS
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback

_WARM_UP = 10

# The steps of an epoch of MNIST, and how many of them gather statistics by default.
_EPOCH, _GATHERED = 469, 23


class InTurn(GIFCallback):
    """Is absent, idle and gathering in turn, and records the duration of each step."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(cache_steps=None, **arguments)
        self.times: tuple[list[float], ...] = ([], [], [])
        self.picking = 0.0
        self._wanted = self.cache_neurons, self.cache_gradients

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        turn = batch_idx % len(self.times)
        self.cache_neurons, self.cache_gradients = self._wanted if turn == 2 else (False, False)
        self.neurons.detach()
        if turn and self._wanted[0]:
            self.neurons.attach(pl_module)
        self.start = time.perf_counter()
        if turn:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        turn = batch_idx % len(self.times)
        if turn:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.times[turn].append(time.perf_counter() - self.start)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.perf_counter()
        super().on_train_epoch_end(trainer, pl_module)
        self.picking = time.perf_counter() - start


def measured(net: str, data: TensorDataset, **arguments: Any) -> tuple[InTurn, int]:
    """The callback after one epoch, and the size of the parameters in bytes."""
    torch.manual_seed(0)
    model, callback = NETS[net](), InTurn(**arguments)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[callback],
    )
    trainer.fit(model, DataLoader(data, 128))
    return callback, sum(parameter.nbytes for parameter in model.parameters())


def cached(callback: GIFCallback) -> int:
    """The size of the statistics in bytes."""
    neurons, gradients = callback.neurons.state(), callback.gradients.state()
    parts = [*neurons.values(), gradients["squares"]]
    return sum(value.nbytes for part in parts for value in part.values())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--net", choices=list(NETS), action="append", help="a network; repeat the option for more")
    options = parser.parse_args()

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    count = 128 * options.steps
    data = TensorDataset(torch.rand(count, 1, 28, 28), torch.arange(count) % 10)
    kinds: dict[str, dict[str, Any]] = {
        "defaults": {},
        "`cache_neurons=False`": {"cache_neurons": False},
        "`cache_gradients=False`": {"cache_gradients": False},
    }
    print(
        "| network | setting | plain step (ms) | idle step, ratio | gathering step, ratio | epoch, ratio |"
        " caches (MB) | parameters (MB) | picking targets (ms) |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for net in options.net or ["tinynet", "resnet"]:
        for kind, arguments in kinds.items():
            callback, own = measured(net, data, **arguments)
            steps = list(zip(*callback.times, strict=False))[_WARM_UP:]
            without = 1e3 * statistics.median(step[0] for step in steps)
            idle, gathered = (statistics.median(step[turn] / step[0] for step in steps) for turn in (1, 2))
            epoch = idle + (gathered - idle) * _GATHERED / _EPOCH
            print(
                f"| {net} | {kind} | {without:.1f} | {idle:.3f} | {gathered:.3f} | {epoch:.3f} |"
                f" {cached(callback) / 1e6:.2f} | {own / 1e6:.2f} | {1e3 * callback.picking:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
