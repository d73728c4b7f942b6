"""Compares the time and memory that `trainer.influence.check()` predicts with those of the calls.

    python benchmarks/check.py --data MNIST/raw [--nets digits mlp tinynet resnet] [--repeats 3] [--queries 20]

Each network is trained for one epoch. Then the check and the calls take turns in one process, `--repeats` times. Times
are medians. The time of an edit is predicted for the number of changes that it made. The memory of each call is
measured in a process of its own, as the growth of the peak resident set during the call (Linux only). Prints a Markdown
table.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch.nn.functional as F
from mnist import NETS, TinyNet, fit, load
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import GIFCallback

_CALLS = ("influence", "queries", "self_influence", "unlearn")


class Digits(TinyNet):
    """A perceptron with one hidden layer for images of 8 × 8 pixels: 4810 parameters."""

    @staticmethod
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


NETS["digits"] = Digits


def fitted(net: str, options: Namespace) -> tuple[pl.Trainer, DataLoader[Any]]:
    """A trainer after one epoch of training, and a loader of the queries."""
    train, test = load(options.data)
    size = min(options.examples, len(train))
    images, labels = train.tensors[0][:size], train.tensors[1][:size]
    if net == "digits":
        images = F.adaptive_avg_pool2d(images, 8)
        test = TensorDataset(F.adaptive_avg_pool2d(test.tensors[0], 8), test.tensors[1])
    trainer, _ = fit(TensorDataset(images, labels), [GIFCallback()], epochs=1, net=net)
    return trainer, DataLoader(Subset(test, range(options.queries)), options.queries)


def calls(trainer: pl.Trainer, loader: DataLoader[Any], options: Namespace) -> dict[str, Callable[[], Any]]:
    forget = list(range(options.forget))
    return {
        "influence": lambda: trainer.influence(loader),
        "queries": lambda: trainer.influence(loader, per_example=True),
        "self_influence": lambda: trainer.self_influence(),
        "unlearn": lambda: trainer.unlearn(forget, dry_run=True),
    }


def grown(net: str, call: str, options: Namespace) -> float:
    """The growth of the peak resident set during a call in a process of its own, in GiB."""
    command = [sys.executable, __file__, "--data", str(options.data), "--nets", net, "--memory_of", call]
    command += ["--examples", str(options.examples), "--queries", str(options.queries), "--forget", str(options.forget)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def print_memory(net: str, call: str, options: Namespace) -> None:
    """Prints what :func:`grown` reads."""
    trainer, loader = fitted(net, options)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = psutil.Process().memory_info().rss
    calls(trainer, loader, options)[call]()
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    print(json.dumps((peak - before) / 2**30))


def measure(net: str, options: Namespace) -> None:
    """Prints the rows of a net."""
    trainer, loader = fitted(net, options)
    times: dict[str, list[float]] = {name: [] for name in ("check", *_CALLS)}
    predicted: dict[str, list[float]] = {name: [] for name in _CALLS}
    memory: dict[str, float] = {}
    for _ in range(options.repeats):
        start = time.perf_counter()
        report = trainer.influence.check(n_queries=options.queries, n_forget=options.forget)
        times["check"].append(time.perf_counter() - start)
        estimates = dict(zip(_CALLS, report.costs, strict=True))
        for name, call in calls(trainer, loader, options).items():
            start = time.perf_counter()
            made = call()
            times[name].append(time.perf_counter() - start)
            estimate = estimates[name]
            further = (len(made.solves) - 1) * (estimate.seconds_per_change or 0.0) if name == "unlearn" else 0.0
            predicted[name].append(estimate.seconds + further)
            memory[name] = estimate.gib
    print(f"| {net} | check itself | | {statistics.median(times['check']):.2g} | | | |")
    for name in _CALLS:
        expected, actual = statistics.median(predicted[name]), statistics.median(times[name])
        size = grown(net, name, options)
        print(
            f"| | {name} | {expected:.2g} | {actual:.2g} | {expected / actual:.2f} | {memory[name]:.2f} | {size:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the four idx files")
    parser.add_argument("--nets", nargs="+", default=["digits", "mlp", "tinynet", "resnet"])
    parser.add_argument("--examples", type=int, default=6000, help="the number of training examples")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--forget", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory_of", choices=_CALLS, help="print the memory of this call only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory_of:
        print_memory(options.nets[0], options.memory_of, options)
        return
    print("| net | call | predicted s | s | ratio | predicted GiB | GiB |\n| --- | --- | --- | --- | --- | --- | --- |")
    for net in options.nets:
        measure(net, options)


if __name__ == "__main__":
    main()
