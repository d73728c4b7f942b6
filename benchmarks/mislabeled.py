"""Measures how well rankings of the training examples find wrong labels, of which a tenth of the data has one.

    python benchmarks/mislabeled.py --data path/to/FashionMNIST/raw --nets mlp cnn

The training examples are ranked by `trainer.self_influence()` with its defaults, over snapshots and with a sketch, by
the training loss, by the norm of the gradient, and by other libraries (`pip install kronfluence captum`). Libraries
that are not installed are skipped.

Prints a Markdown table: the AUC, and the share of the wrong labels among the first 10 and 20 % of the ranking. Values
are means over seeds of the labels and of the network. Seconds are processor time.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lds import Snapshots
from mnist import NETS, fit, load
from peers import captum_gradients, classification, frozen
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback

Suspicion = Callable[[pl.Trainer, nn.Module, TensorDataset, list[dict[str, Tensor]]], Tensor]
"""``(trainer, model, train, checkpoints) ↦ (n,)``: a high value marks a suspicious example."""


def self_influence(
    trainer: pl.Trainer, model: nn.Module, train: TensorDataset, checkpoints: Any, *, four: bool = False, **options: Any
) -> Tensor:
    """The scores of ``trainer.self_influence``, with the snapshots that the callback has kept, or with four of them."""
    tracker = next(one for one in trainer.callbacks if isinstance(one, GIFCallback)).tracker
    before = tracker.snapshots
    if four:
        tracker.snapshots = next(one for one in trainer.callbacks if isinstance(one, Snapshots)).four
    report = trainer.self_influence(**options)
    tracker.snapshots = before
    return torch.zeros(len(train), dtype=torch.float64).index_copy(0, report.indices, report.scores[0])


@torch.no_grad()
def loss(trainer: pl.Trainer, model: nn.Module, train: TensorDataset, checkpoints: Any) -> Tensor:
    x, y = train.tensors
    return F.cross_entropy(torch.cat([model(part) for part in x.split(1000)]), y, reduction="none")


def gradient_length(trainer: pl.Trainer, model: nn.Module, train: TensorDataset, checkpoints: Any) -> Tensor:
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def one(theta: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, theta, (x[None],)), y[None])

    lengths = []
    for x, y in DataLoader(train, 250):
        rows = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(parameters, x, y)
        lengths.append(sum(part.flatten(1).square().sum(1) for part in rows.values()))
    return torch.cat(lengths)


def kronfluence(trainer: pl.Trainer, model: nn.Module, train: TensorDataset, checkpoints: Any) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    task = classification()
    with tempfile.TemporaryDirectory() as folder:
        options = {"cpu": True, "log_level": logging.ERROR, "disable_tqdm": True, "output_dir": folder}
        analyzer = Analyzer("peer", prepare_model(frozen(model), task), task, **options)
        factors = FactorArguments(strategy="ekfac")
        analyzer.fit_all_factors("factors", train, per_device_batch_size=256, factor_args=factors)
        settings = ScoreArguments(damping_factor=None)
        analyzer.compute_self_scores("scores", "factors", train, per_device_train_batch_size=256, score_args=settings)
        return analyzer.load_self_scores("scores")["all_modules"].float()


def tracin(trainer: pl.Trainer, model: nn.Module, train: TensorDataset, checkpoints: Any) -> Tensor:
    from captum.influence import TracInCP

    def put(model: nn.Module, checkpoint: dict[str, Tensor]) -> float:
        model.load_state_dict(checkpoint)
        return 1.0

    model = frozen(model)
    options, size = captum_gradients(model, 250)
    found = TracInCP(model, train, iter(checkpoints), put, batch_size=size, **options)
    return found.self_influence().detach()


RANKINGS: dict[str, tuple[str, Suspicion]] = {
    "trainer.self_influence": ("lightning_gif", self_influence),
    "one snapshot": ("lightning_gif", partial(self_influence, snapshots=True)),
    "four snapshots": ("lightning_gif", partial(self_influence, snapshots=True, four=True)),
    "sketch": ("lightning_gif", partial(self_influence, solver="cg")),
    "sketch, four snapshots": ("lightning_gif", partial(self_influence, solver="cg", snapshots=True, four=True)),
    "loss": ("torch", loss),
    "gradient norm": ("torch", gradient_length),
    "kronfluence EK-FAC": ("kronfluence", kronfluence),
    "captum TracInCP": ("captum", tracin),
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--nets", nargs="+", default=["mlp", "cnn"], choices=list(NETS), help="the networks")
    parser.add_argument("--examples", type=int, default=5000, help="training examples")
    parser.add_argument("--epochs", type=int, default=15, help="training epochs")
    parser.add_argument("--seeds", type=int, default=3, help="draws of wrong labels, each with its own network")
    parser.add_argument("--only", nargs="+", choices=list(RANKINGS), default=list(RANKINGS), help="the rankings")
    options = parser.parse_args()
    whole, _ = load(options.data)
    print("| network | ranking | AUC | found in the first 10 % | in the first 20 % | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for net in options.nets:
        found: dict[str, list[tuple[float, ...]]] = {}
        for seed in range(options.seeds):
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(whole), generator=generator)[: options.examples]
            x, y = (tensor[chosen] for tensor in whole.tensors)
            wrong = torch.zeros(len(y), dtype=torch.bool)
            wrong[torch.randperm(len(y), generator=generator)[: len(y) // 10]] = True
            other = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
            train = TensorDataset(x, torch.where(wrong, other, y))
            snapshots = Snapshots(options.epochs)
            trainer, model = fit(
                train,
                [GIFCallback(), snapshots],
                epochs=options.epochs,
                seed=seed,
                net=net,
                decay=True,
                batch_size=64,
            )
            for name, (package, rank) in RANKINGS.items():
                if name not in options.only or find_spec(package) is None:
                    continue
                start = time.process_time()
                suspicion = rank(trainer, model.eval(), train, snapshots.kept).double()
                seconds = time.process_time() - start
                order = suspicion.argsort(descending=True)
                shares = [float(wrong[order[: len(y) * share // 100]].sum() / wrong.sum()) for share in (10, 20)]
                row = (float(roc_auc_score(wrong, suspicion)), *(100 * share for share in shares), seconds)
                found.setdefault(name, []).append(row)
                print(net, seed, name, row, file=sys.stderr, flush=True)
        for name, rows in found.items():
            auc, first, second, seconds = (mean(values) for values in zip(*rows, strict=True))
            print(f"| {net} | {name} | {auc:.4f} | {first:.1f} % | {second:.1f} % | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
