"""Measures a store of gradients: its accuracy by size, and the time to write it and to answer queries from it.

    python benchmarks/store.py --data MNIST/raw [--what accuracy --what time] [--nets tinynet mlp cnn]
        [--ranks 64 128 256 512 1024] [--train 60000] [--scored 6000] [--queries 100] [--entries 8192]

- accuracy: scores of some training examples, from a store and in full (`solver="ekfac"`), for each example of some test
  images. The correlation is that of the two scores over the training examples, a mean over queries; next to it is its
  5th percentile. The last column is the share of the ten highest and ten lowest scores that both have in common.
- time: the store of all training images, with the default rank. One pass is one forward and backward pass over the
  training data without an update. Queries are test images. The correlation with full scores is that of `--scored`
  training images for `--queries` queries.

Each network is trained for one epoch, the perceptron and the small CNN for three. Times are CPU seconds on one thread.
Prints Markdown tables; progress goes to stderr.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import mnist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, InfluenceReport
from lightning_gif.curvature import projection

EPOCHS = {"tinynet": 1, "mlp": 3, "cnn": 3}

ENDS = 10


def part(data: TensorDataset, rows: Any) -> TensorDataset:
    return TensorDataset(*(tensor[rows] for tensor in data.tensors))


def fitted(net: str, train: TensorDataset) -> tuple[pl.Trainer, mnist.TinyNet]:
    trainer, model = mnist.fit(train, [GIFCallback(snapshots=0, log_reports=False)], epochs=EPOCHS[net], net=net)
    say(f"{net} is trained")
    return trainer, model


def spent(call: Callable[[], Any]) -> tuple[float, Any]:
    """The CPU seconds of a call, and its result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """The correlation of two sets of scores ``(q, n)`` of each query, ``(q,)``."""
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(one, other, strict=True)])


def common(one: InfluenceReport, other: InfluenceReport) -> float:
    """The share of the strongest proponents and opponents that two reports have in common."""
    ends = [(one.proponents(ENDS), other.proponents(ENDS)), (one.opponents(ENDS), other.opponents(ENDS))]
    shared = [
        len(set(a.tolist()) & set(b.tolist()))
        for mine, others in ends
        for a, b in zip(mine.indices, others.indices, strict=True)
    ]
    return sum(shared) / len(shared) / ENDS


def accuracy(options: Any, train: TensorDataset, test: TensorDataset, folder: Path) -> None:
    print(
        "| network | parameters | coordinates | bytes an example | correlation | 5th percentile | same strongest ten |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[: options.scored].sort().values
    queries = part(test, slice(0, options.queries))
    for net in options.nets:
        trainer, model = fitted(net, train)
        size = sum(parameter.numel() for parameter in model.parameters())
        ask = partial(trainer.influence, queries, per_example=True)
        full = ask(solver="ekfac", among=chosen)
        say("full scores are computed")
        for rank in options.ranks:
            store = trainer.store_gradients(folder / f"{net} {rank}", rank=rank, among=chosen)
            report = ask(store=store.folder)
            found = correlations(full.scores, report.scores)
            row = [net, f"{size:,}", rank, bytes_of(store), f"{found.mean():.3f}", f"{found.quantile(0.05):.3f}"]
            print("|", " | ".join(map(str, [*row, f"{common(full, report):.2f}"])), "|", flush=True)


def bytes_of(store: Any) -> int:
    """The bytes of the gradient and the label of each example."""
    chunks = sum(path.stat().st_size for path in store.folder.glob("chunk-*"))
    return round(chunks / store.manifest.n_stored)


def timed(options: Any, train: TensorDataset, test: TensorDataset, folder: Path) -> None:
    print(
        "| network | images | one pass (s) | write (s) | passes | bytes an example | other files (MiB) |"
        " one query (s) |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    lines = list[str]()
    for net in options.nets:
        trainer, model = fitted(net, train)
        once, _ = spent(lambda model=model: one_pass(model, train))
        written, store = spent(lambda trainer=trainer, net=net: trainer.store_gradients(folder / f"{net} all"))
        say(str(store))
        ask = partial(trainer.influence, store=store.folder)
        ask(part(test, [0]))  # warms up
        query, _ = spent(lambda ask=ask: ask(tuple(tensor[:1] for tensor in test.tensors)))
        size = bytes_of(store)
        rest = (store.nbytes - size * len(train)) / 2**20
        row = [net, len(train), f"{once:.1f}", f"{written:.1f}", f"{written / once:.1f}", size, f"{rest:.1f}"]
        print("|", " | ".join(map(str, [*row, f"{query:.2f}"])), "|", flush=True)
        lines.append(f"| {net} | {many(options, trainer, ask, train, test)} |")
    print("\n| network | 500 queries (s) | correlation | 5th percentile | in the store's words |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(lines), flush=True)


def many(options: Any, trainer: pl.Trainer, ask: Callable[..., InfluenceReport], train: Any, test: Any) -> str:
    """The time of 500 queries, and the correlation with full scores."""
    several, _ = spent(lambda: ask(part(test, slice(0, 500)), per_example=True))
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[: options.scored].sort().values
    queries = part(test, slice(0, options.queries))
    full = trainer.influence(queries, per_example=True, solver="ekfac", among=chosen)
    report = ask(queries, per_example=True, among=chosen)
    found = correlations(full.scores, report.scores)
    own = report.settings["store_correlation"]
    return f"{several:.1f} | {found.mean():.3f} | {found.quantile(0.05):.3f} | {own:.3f}"


def one_pass(model: mnist.TinyNet, train: TensorDataset) -> None:
    parameters = list(model.parameters())
    for x, y in zip(*(tensor.split(256) for tensor in train.tensors), strict=True):
        torch.autograd.grad(F.cross_entropy(model(x), y), parameters)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx files")
    parser.add_argument("--what", action="append", choices=("accuracy", "time"), help="by default both")
    parser.add_argument("--nets", nargs="+", default=["tinynet", "mlp", "cnn"], choices=EPOCHS, help="networks")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="numbers of coordinates"
    )
    parser.add_argument("--train", type=int, default=60000, help="number of training images")
    parser.add_argument("--scored", type=int, default=6000, help="number of training images that are scored in full")
    parser.add_argument("--queries", type=int, default=100, help="number of test images that are queries")
    parser.add_argument("--entries", type=int, default=projection.ENTRIES, help="entries before principal components")
    options = parser.parse_args()
    torch.set_num_threads(1)
    projection.ENTRIES = options.entries
    train, test = mnist.load(options.data)
    train = part(train, slice(0, options.train))
    with tempfile.TemporaryDirectory() as folder:
        for what in options.what or ["accuracy", "time"]:
            {"accuracy": accuracy, "time": timed}[what](options, train, test, Path(folder) / what)


if __name__ == "__main__":
    main()
