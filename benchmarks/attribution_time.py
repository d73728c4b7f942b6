"""Measures the time and memory from a trained model to a ranking of all training images, also for other libraries.

    python benchmarks/attribution_time.py --data path/to/MNIST/raw --queries 1 [--peers "kronfluence EK-FAC"]

The model is TinyNet or another one (`--net`), trained for one epoch. Each row runs in its own process, from the loaded
weights to the scores. Its seconds are processor time. They include solves, factorisations and passes over the data. Its
memory is the peak above that of the loaded data.

Prints a Markdown table. The last line says how many forward passes over the training images a scoring pass costs.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from lds import say
from mnist import NETS, fit, load
from peers import PEERS
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import attach
from lightning_gif.data.examples import Examples
from lightning_gif.objective.objective import Objective

OURS = {"auto": "trainer.influence", "ekfac": 'trainer.influence, solver="ekfac"'}
"""The names of our rows, by solver."""


def trained(net: str, weights: Path) -> pl.LightningModule:
    model = NETS[net]()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def attached(model: pl.LightningModule, train: TensorDataset) -> pl.Trainer:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    attach(trainer, model, train_dataloaders=DataLoader(train, 128))
    return trainer


def measure(name: str, net: str, weights: Path, folder: Path, examples: int, queries: int) -> dict[str, float]:
    """The processor seconds of one row, and its peak memory in MiB above that of the loaded data."""
    train, test = load(folder)
    train = TensorDataset(*(tensor[:examples] for tensor in train.tensors))
    asked = TensorDataset(*(tensor[:queries] for tensor in test.tensors))
    model = trained(net, weights)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    if name in OURS:
        trainer = attached(model, train)
        trainer.influence(asked.tensors, per_example=queries > 1, solver=name).proponents(10)
    else:
        PEERS[name](model.eval(), train, asked).topk(10)
    seconds = time.process_time() - start
    return {"seconds": seconds, "memory": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def passes(net: str, weights: Path, folder: Path) -> tuple[float, float]:
    """The costs of a scoring pass and of per-example gradients, in forward passes: medians of seven runs."""
    train, _ = load(folder)
    train = TensorDataset(*(tensor[:4096] for tensor in train.tensors))
    model = trained(net, weights)
    trainer = attached(model, train)
    with Objective.open(trainer, model) as objective:
        data = Examples.from_loader(DataLoader(train, 128), objective.prepare, batch_size=256).cached()
        objective.learn_structure(data)
        direction = torch.randn(1, objective.space.size)
        ratios = []
        for _ in range(7):
            times = []
            for function in (
                lambda batch: model(batch.data[0]),
                lambda batch: objective.directional_derivatives(batch, direction),
                lambda batch: sum(len(rows) for rows in objective.gradients(batch)),
            ):
                start = time.perf_counter()
                with torch.no_grad():
                    for batch in data.batches():
                        function(batch)
                times.append(time.perf_counter() - start)
            ratios.append((times[1] / times[0], times[2] / times[0]))
    return median(one for one, _ in ratios), median(other for _, other in ratios)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--net", default="tinynet", choices=list(NETS), help="the network")
    parser.add_argument("--examples", type=int, default=60000, help="training images to score")
    parser.add_argument("--queries", type=int, default=1, help="test images, each of which is one query")
    parser.add_argument("--solvers", nargs="+", default=list(OURS), choices=list(OURS), help="our rows")
    parser.add_argument(
        "--peers",
        nargs="*",
        default=["kronfluence EK-FAC", "dattri CG"],
        choices=list(PEERS),
        help="other libraries to measure",
    )
    parser.add_argument("--row", help="measure only this row, in this process, and print JSON (used internally)")
    parser.add_argument("--weights", type=Path, help="weights of the trained model, for --row")
    options = parser.parse_args()
    if options.row:
        given = options.net, options.weights, options.data, options.examples, options.queries
        print(json.dumps(measure(options.row, *given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        train, _ = load(options.data)
        torch.save(fit(train, [], epochs=1, net=options.net)[1].state_dict(), weights)
        print("| | queries | training images | seconds | relative to the first | memory (MiB) |")
        print("| --- |" + " --- |" * 5)
        base = 0.0
        for name in (*options.solvers, *options.peers):
            title = f"`{OURS[name]}`" if name in OURS else name
            command = [sys.executable, __file__, "--row", name, "--net", options.net, "--weights", str(weights)]
            command += ["--data", str(options.data), "--examples", str(options.examples)]
            done = subprocess.run(
                [*command, "--queries", str(options.queries)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                say(done.stderr)
                print(f"| {title} | {options.queries} | {options.examples} | failed | | |", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            base = base or found["seconds"]
            ratio = found["seconds"] / base
            cells = (title, options.queries, options.examples, f"{found['seconds']:.0f}", f"{ratio:.1f}")
            print("| " + " | ".join(map(str, (*cells, f"{found['memory']:.0f}"))) + " |", flush=True)
        one, gradients = passes(options.net, weights, options.data)
        print(f"\nA scoring pass costs {one:.1f} forward passes, per-example gradients cost {gradients:.1f}.")


if __name__ == "__main__":
    main()
