"""Measures calls in one process, and in several under DDP and with sharded parameters (FSDP2).

    python benchmarks/processes.py [--widths 300 1000] [--examples 4096] [--processes 2]

The networks are the perceptrons of `scaling.py` on random examples of MNIST's shape. Each process runs on one thread,
over gloo. After one epoch of training: the EK-FAC factors of a query with the scores of all examples, self-influence,
a store of gradients, queries to it, and an edit by one solve with its undoing. A call is measured once. Seconds are CPU
seconds of the first process: two processes that divided all work would take half of those of one. Bytes are those of
the tensors and objects that a process passes to collectives of the package, or gets from them. Those of training are
not counted. Prints a Markdown table.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from scaling import Perceptron, data
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gif import GIFCallback
from lightning_gif.distributed import ProcessGroup

KINDS = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}


class Net(Perceptron):
    """A perceptron whose parameters are sharded if there is a device mesh."""

    def configure_model(self) -> None:
        if self.device_mesh is not None and not hasattr(self.net, "reshard"):
            from torch.distributed.fsdp import fully_shard

            for layer in (*self.net, self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Counted:
    """Counts the bytes of all collectives of the package."""

    def __init__(self) -> None:
        self.bytes, own = 0, ProcessGroup._call

        def call(group: ProcessGroup, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = own(group, function, *args, **kwargs)
            given = result if isinstance(result, Tensor) else args[0]
            self.bytes += given.nbytes if isinstance(given, Tensor) else len(pickle.dumps(given))
            return result

        ProcessGroup._call = call  # type: ignore[method-assign]


def measure(kind: str, width: int, options: Namespace, folder: Path) -> list[dict[str, Any]]:
    """The CPU seconds and the bytes of each call in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = 1 if kind == "one" else options.processes
    strategies: dict[str, Callable[[], Any]] = {
        "one": lambda: "auto",
        "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: ModelParallelStrategy(world, 1, process_group_backend="gloo"),
    }
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "devices": world, "strategy": strategies[kind](), "max_epochs": 1, "logger": False},
        **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        callbacks=[GIFCallback(snapshots=0, log_reports=False, unconverged="ignore")],
    )
    dataset, model, counted, rows = data(options.examples), Net(width), Counted(), []
    trainer.fit(model, DataLoader(dataset, 256 // world, shuffle=True))
    query = tuple(tensor[:10] for tensor in dataset.tensors)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        before, start = counted.bytes, time.process_time()
        result = call()
        seconds, sent = time.process_time() - start, counted.bytes - before
        rows.append({"call": name, "seconds": seconds, "bytes": sent})
        return result

    timed("scores by EK-FAC", lambda: trainer.influence(query, per_example=True, solver="ekfac"))
    timed("self-influence by EK-FAC", lambda: trainer.self_influence(solver="ekfac"))
    store = timed("a store", lambda: trainer.store_gradients(folder / f"store of {kind} {width}"))
    timed("10 queries to it", lambda: trainer.influence(query, per_example=True, store=store.folder))
    edit = timed("an edit", lambda: trainer.unlearn(list(range(10)), step="natural"))
    timed("undoing it", edit.undo)
    return rows


def launched(kind: str, width: int, options: Namespace, folder: Path) -> list[dict[str, Any]]:
    """What the first process measured. Lightning starts the others."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE")}
    arguments = ["--examples", str(options.examples), "--processes", str(options.processes), "--widths", str(width)]
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--kind", kind, "--folder", str(folder)]
    done = subprocess.run(command, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads((folder / f"{kind} {width}.json").read_text())


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[300, 1000], help="hidden widths, one network each")
    parser.add_argument("--examples", type=int, default=4096, help="training examples")
    parser.add_argument("--processes", type=int, default=2, help="processes under DDP and FSDP2")
    parser.add_argument("--kind", choices=list(KINDS), help="measure in this process, for the command itself")
    parser.add_argument("--folder", type=Path, help="where --kind writes")
    options = parser.parse_args()
    if options.kind:
        warnings.filterwarnings("ignore")
        rows = measure(options.kind, options.widths[0], options, options.folder)
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            (options.folder / f"{options.kind} {options.widths[0]}.json").write_text(json.dumps(rows))
        return
    names = [KINDS[kind] if kind == "one" else f"{options.processes}, {KINDS[kind]}" for kind in KINDS]
    seconds, sent = " | ".join(names), " | ".join(names[1:])
    print(f"| parameters | call | CPU seconds of a process: {seconds} | MiB in collectives: {sent} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for width in options.widths:
        with tempfile.TemporaryDirectory() as folder:
            found = {kind: launched(kind, width, options, Path(folder)) for kind in KINDS}
        count = sum(parameter.numel() for parameter in Net(width).parameters())
        for row in zip(*found.values(), strict=True):
            seconds = " | ".join(f"{one['seconds']:.2f}" for one in row)
            sent = " | ".join(f"{one['bytes'] / 2**20:.2f}" for one in row[1:])
            print(f"| {count:,} | {row[0]['call']} | {seconds} | {sent} |", flush=True)


if __name__ == "__main__":
    main()
