"""What the callback costs in training: the time of a step with it and without it, and the memory of its caches.

    python benchmarks/overhead.py [--steps 300] [--net tinynet --net resnet]

Random images of MNIST's size, batches of 128, one thread. The callback works in every other step of one fit, and is
gone in those between. A step is from its first hook to its last, without the reading of the batch; of each pair of
neighbouring steps the ratio, of these the median and the quartiles. What is done once an epoch, picking the targets, is
measured by itself.
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


class EveryOther(GIFCallback):
    """Works in every other step, and notes how long each takes."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.works, self.picking = False, 0.0
        self._wanted = self.cache_neurons, self.cache_gradients

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.works = batch_idx % 2 == 0
        self.cache_neurons, self.cache_gradients = self._wanted if self.works else (False, False)
        self.neurons.detach()
        if self.cache_neurons:
            self.neurons.attach(pl_module)
        self.start = time.perf_counter()
        if self.works:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.works:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.times[self.works].append(time.perf_counter() - self.start)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.perf_counter()
        super().on_train_epoch_end(trainer, pl_module)
        self.picking = time.perf_counter() - start


def measured(net: str, data: TensorDataset, **arguments: Any) -> tuple[EveryOther, int]:
    """The callback after an epoch, and the bytes of the parameters."""
    torch.manual_seed(0)
    model, callback = NETS[net](), EveryOther(**arguments)
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
    """Bytes of the statistics."""
    neurons, gradients = callback.neurons.state(), callback.gradients.state()
    parts = [*neurons.values(), gradients["squares"]]
    return sum(value.nbytes for part in parts for value in part.values())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--net", choices=list(NETS), action="append")
    options = parser.parse_args()

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    count = 128 * options.steps
    data = TensorDataset(torch.rand(count, 1, 28, 28), torch.arange(count) % 10)
    kinds: dict[str, dict[str, Any]] = {
        "default": {},
        "no neurons": {"cache_neurons": False},
        "no gradients": {"cache_gradients": False},
    }
    print(
        "| net | caches | step without, ms | with, ms | ratio (quartiles) | caches, MB | parameters, MB | picking, ms |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for net in options.net or ["tinynet", "resnet"]:
        for kind, arguments in kinds.items():
            callback, own = measured(net, data, **arguments)
            pairs = list(zip(callback.times[True], callback.times[False], strict=False))[_WARM_UP:]
            low, middle, high = statistics.quantiles([on / off for on, off in pairs], n=4)
            with_it, without = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
            print(
                f"| {net} | {kind} | {without:.2f} | {with_it:.2f} | {middle:.3f} ({low:.3f} to {high:.3f}) |"
                f" {cached(callback) / 1e6:.2f} | {own / 1e6:.2f} | {1e3 * callback.picking:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
