"""Compares the time and memory that `trainer.influence.check()` predicts with those of the calls.

    python benchmarks/check.py --data MNIST/raw [--nets digits mlp tinynet resnet] [--repeats 3] [--queries 20]

Each network is trained for one epoch. Then the check and the calls take turns in one process, `--repeats` times. Times
are medians. The time of an edit is predicted for the number of changes that it made. The memory of each call is
measured in a process of its own: the tensors that live at its peak, and the growth of the process's peak resident set
(Linux only). With `--memory`, only the memory is measured. Prints a Markdown table.
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
from lightning_gif.inspection.peak import PeakMemory

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


def memory_of(net: str, call: str, options: Namespace) -> tuple[float, float]:
    """The tensors at the peak of a call in a process of its own, and the growth of its peak resident set, in GiB."""
    command = [sys.executable, __file__, "--data", str(options.data), "--nets", net, "--memory_of", call]
    command += ["--examples", str(options.examples), "--queries", str(options.queries), "--forget", str(options.forget)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tensors, grown = json.loads(output.splitlines()[-1])
    return tensors, grown


def print_memory(net: str, call: str, options: Namespace) -> None:
    """Prints what :func:`memory_of` reads."""
    trainer, loader = fitted(net, options)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = psutil.Process().memory_info().rss
    with PeakMemory() as memory:
        calls(trainer, loader, options)[call]()
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    print(json.dumps([memory.peak / 2**30, (peak - before) / 2**30]))


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
            memory[name] = estimates[name].gib
            if options.memory:
                continue
            start = time.perf_counter()
            made = call()
            times[name].append(time.perf_counter() - start)
            estimate = estimates[name]
            further = (len(made.solves) - 1) * (estimate.seconds_per_change or 0.0) if name == "unlearn" else 0.0
            predicted[name].append(estimate.seconds + further)
    print(f"| {net} | check itself | | {statistics.median(times['check']):.2g} | | | | |")
    for name in _CALLS:
        tensors, grown = memory_of(net, name, options)
        row = " | | |"
        if not options.memory:
            expected, actual = statistics.median(predicted[name]), statistics.median(times[name])
            row = f" {expected:.2g} | {actual:.2g} | {expected / actual:.2f} |"
        print(f"| | {name} |{row} {memory[name]:.3f} | {tensors:.3f} | {grown:.2f} |", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the four idx files")
    parser.add_argument("--nets", nargs="+", default=["digits", "mlp", "tinynet", "resnet"])
    parser.add_argument("--examples", type=int, default=6000, help="the number of training examples")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--forget", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure only the memory")
    parser.add_argument("--memory_of", choices=_CALLS, help="print the memory of this call only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory_of:
        print_memory(options.nets[0], options.memory_of, options)
        return
    print("| net | call | predicted s | s | ratio | predicted GiB | tensors, GiB | process, GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for net in options.nets:
        measure(net, options)


if __name__ == "__main__":
    main()
