"""Measures scores against retraining on several tasks that differ in data, network, optimizer and length of training.

    python benchmarks/tasks.py --mnist path/to/MNIST/raw --fashion path/to/FashionMNIST/raw
        [--tasks "mlp short" digits] [--rows defaults] [--cache folder] [--halves 40] [--seeds 2]

Each network is retrained on random halves of its training data. A prediction for a half is the sum of the scores of the
examples that it leaves out, and the linear datamodeling score (LDS) is the Spearman correlation with the losses of the
retrained networks, averaged over queries. Queries are split off from the training data. One network, trained on all
data, is scored. Brackets are 95 % intervals of a bootstrap over queries and halves.

Three tasks are kept aside (`--aside`): no default was chosen on them. `--cache` keeps the losses of the retrained
networks. Without the folders of images, their tasks are left out. Prints a Markdown table; progress goes to stderr.
"""

from __future__ import annotations

import sys
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import mnist
import torch
import torch.nn.functional as F
from lds import bootstrap, interval, say, spearman
from peers import PEERS
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, attach
from lightning_gif.selection.snapshots import Snapshots

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

QUERIES, BATCH = 30, 50


@dataclass(frozen=True)
class Task:
    """A network and how it is trained.

    Attributes:
        data: From the folders of MNIST and Fashion-MNIST to inputs and targets.
        net: A new network with random weights.
        optimizer: From parameters to an optimizer.
        epochs: The number of epochs.
    """

    data: Callable[[dict[str, Path]], tuple[Tensor, Tensor]]
    net: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int


class Module(pl.LightningModule):
    """A classifier for integer targets, and a regression for others."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return losses(self.net(batch[0]), batch[1], "mean")


def losses(predicted: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if targets.is_floating_point():
        return F.mse_loss(predicted.squeeze(1), targets, reduction=reduction)
    return F.cross_entropy(predicted, targets, reduction=reduction)


# ----------------------------------------------------------------------------------------------------------------------
# The tasks
# ----------------------------------------------------------------------------------------------------------------------


def images(name: str, count: int = 2000) -> Callable[[dict[str, Path]], tuple[Tensor, Tensor]]:
    def load(folders: dict[str, Path]) -> tuple[Tensor, Tensor]:
        whole, _ = mnist.load(folders[name])
        chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[: count + QUERIES]
        return whole.tensors[0][chosen], whole.tensors[1][chosen]

    return load


def small(load: Callable[..., Any]) -> Callable[[dict[str, Path]], tuple[Tensor, Tensor]]:
    def standardised(folders: dict[str, Path]) -> tuple[Tensor, Tensor]:
        x, y = load(return_X_y=True)
        x = torch.tensor(x, dtype=torch.float32)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        return ((x - x.mean(0)) / x.std(0).clamp_min(1e-6))[order], torch.tensor(y)[order].long()

    return standardised


def friedman(folders: dict[str, Path], count: int = 1000 + QUERIES) -> tuple[Tensor, Tensor]:
    x, y = datasets.make_friedman1(count, noise=1.0, random_state=0)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    return 2 * x - 1, (y - y.mean()) / y.std()


def chains(folders: dict[str, Path], count: int = 1500 + QUERIES) -> tuple[Tensor, Tensor]:
    """Sequences of 16 tokens from one Markov chain for each of four classes."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.softmax(1.5 * torch.randn(4, 32, 32, generator=generator), dim=2)
    labels = torch.randint(0, 4, (count,), generator=generator)
    tokens = [torch.randint(0, 32, (len(labels),), generator=generator)]
    for _ in range(15):
        tokens.append(torch.multinomial(steps[labels, tokens[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(tokens, dim=1), labels


def perceptron(*widths: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return make


def convolutions(norm: Callable[[int], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), norm(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), norm(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 49, 10)),
        )

    return make


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 32)
        self.position = nn.Parameter(0.1 * torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x) + self.position).mean(1))


def sgd(rate: float, momentum: float = 0.9, decay: float = 0.0) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, rate, momentum, weight_decay=decay)


def adamw(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, rate)


MLP = perceptron(784, 128, 64, 10)
TASKS = {
    "mlp short": Task(images("fashion"), MLP, sgd(0.02), 5),
    "mlp long": Task(images("fashion"), MLP, sgd(0.02), 40),
    "cnn": Task(images("mnist"), convolutions(lambda _: nn.Identity()), adamw(2e-3), 10),
    "cnn, BatchNorm": Task(images("fashion"), convolutions(nn.BatchNorm2d), sgd(0.02), 10),
    "transformer": Task(chains, Transformer, adamw(2e-3), 12),
    "regression": Task(friedman, perceptron(10, 64, 32, 1), adamw(3e-3), 30),
    "digits": Task(small(datasets.load_digits), perceptron(64, 32, 10), sgd(0.05, 0.0), 30),
}
ASIDE = {
    "mnist mlp": Task(images("mnist"), perceptron(784, 64, 10), sgd(0.05, 0.0, 1e-3), 20),
    "cnn, GroupNorm": Task(images("fashion"), convolutions(lambda n: nn.GroupNorm(4, n)), adamw(1e-3), 15),
    "cancer": Task(small(datasets.load_breast_cancer), perceptron(30, 24, 24, 2), adamw(3e-3), 30),
}


# ----------------------------------------------------------------------------------------------------------------------
# Training and scoring
# ----------------------------------------------------------------------------------------------------------------------


def train(task: Task, x: Tensor, y: Tensor, seed: int) -> tuple[Module, dict[str, Snapshots]]:
    """A trained network, and the snapshots that the callback keeps: by default, and four of them."""
    torch.manual_seed(seed)
    net, kept = task.net(), {"default": Snapshots("auto"), "four": Snapshots(4)}
    module = Module(net)
    optimizer = task.optimizer(net.parameters())
    for epoch in range(task.epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            if len(rows) < BATCH:
                continue
            optimizer.zero_grad()
            losses(net(x[rows]), y[rows], "mean").backward()
            optimizer.step()
        for snapshots in kept.values():
            snapshots.add(epoch, module)
    return module.eval(), kept


def truth(
    task: Task, x: Tensor, y: Tensor, asked: tuple[Tensor, Tensor], halves: int, seeds: int, cache: Path | None
) -> tuple[Tensor, Tensor]:
    """A mask ``(halves, n)`` of the examples left out of each half, and the losses ``(halves, seeds, queries)``."""
    generator, n = torch.Generator().manual_seed(1), len(x)
    removed = torch.zeros(halves, n, dtype=torch.float64)
    for row in removed:
        row[torch.randperm(n, generator=generator)[n // 2 :]] = 1
    if cache is not None and cache.exists():
        return removed, torch.load(cache)
    found = torch.empty(halves, seeds, len(asked[0]), dtype=torch.float64)
    for half, row in enumerate(removed):
        for seed in range(seeds):
            module, _ = train(task, x[row == 0], y[row == 0], 1000 + half * seeds + seed)
            with torch.no_grad():
                found[half, seed] = losses(module(asked[0]).double(), asked[1].to(_target_type(asked[1])), "none")
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, cache)
    return removed, found


def _target_type(targets: Tensor) -> torch.dtype:
    return torch.float64 if targets.is_floating_point() else targets.dtype


@dataclass(frozen=True)
class Scored:
    """A trained network to score."""

    callback: GIFCallback
    trainer: pl.Trainer
    module: Module
    train: TensorDataset
    queries: TensorDataset
    kept: dict[str, Snapshots]


def scored(task: Task, x: Tensor, y: Tensor, asked: tuple[Tensor, Tensor], seed: int = 0) -> Scored:
    module, kept = train(task, x, y, seed)
    data = TensorDataset(x, y)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=task.epochs
    )
    callback = attach(trainer, module, train_dataloaders=DataLoader(data, 256))
    return Scored(callback, trainer, module, data, TensorDataset(*asked), kept)


Score = Callable[[Scored], Tensor]


def ours(snapshots: str = "default", **options: Any) -> Score:
    def score(of: Scored) -> Tensor:
        of.callback.tracker.snapshots = of.kept.get(snapshots, Snapshots(0))
        report = of.trainer.influence(of.queries.tensors, per_example=True, unconverged="ignore", **options)
        values = torch.zeros(report.scores.shape, dtype=torch.float64)
        values[:, report.indices] = report.scores
        return values

    return score


def theirs(name: str) -> Score:
    """The scores of another library; all of them take classifiers only."""
    return lambda of: PEERS[name](of.module, of.train, of.queries).double()


ROWS: dict[str, dict[str, Score]] = {
    "defaults": {
        "defaults": ours(),
        "the last state only, `snapshots=False`": ours("none"),
        "five states, `GIFCallback(snapshots=4)`": ours("four"),
    },
    "layers": {
        "`solver='ekfac'`": ours(solver="ekfac"),
        "the last state only, `solver='ekfac', snapshots=False`": ours("none", solver="ekfac"),
        "five states, `solver='ekfac'`, `GIFCallback(snapshots=4)`": ours("four", solver="ekfac"),
    },
    "sketch": {
        "`solver='nystrom', max_iter=512, snapshots=False`": ours("none", solver="nystrom", max_iter=512),
        "`solver='nystrom', max_iter=512`": ours(solver="nystrom", max_iter=512),
    },
    "peers": {name: theirs(name) for name in ("kronfluence EK-FAC", "gradient dot product")},
}


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder with the four gzipped idx files of MNIST")
    parser.add_argument("--fashion", type=Path, help="the same of Fashion-MNIST")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *ASIDE])
    parser.add_argument("--aside", action="store_true", help="the tasks that are kept aside")
    parser.add_argument("--rows", nargs="+", default=["defaults"], choices=list(ROWS))
    parser.add_argument("--halves", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="folder for the losses of the retrained networks")
    options = parser.parse_args()
    digits.quiet()
    warnings.simplefilter("ignore")
    folders = {"mnist": options.mnist, "fashion": options.fashion}
    names = options.tasks or list(ASIDE if options.aside else TASKS)
    rows = {name: score for group in options.rows for name, score in ROWS[group].items()}
    print("| task | agreement of seeds |" + "".join(f" {name} |" for name in rows))
    print("| --- | --- |" + " --- |" * len(rows))
    for name in names:
        task = {**TASKS, **ASIDE}[name]
        try:
            x, y = task.data(folders)
        except TypeError:
            continue  # no folder of images
        asked, x, y = (x[:QUERIES], y[:QUERIES]), x[QUERIES:], y[QUERIES:]
        cache = options.cache and options.cache / f"{name}.pt"
        removed, found = truth(task, x, y, asked, options.halves, options.seeds, cache)
        target = found.mean(dim=1).numpy()
        of = scored(task, x, y, asked)
        cells = [name, f"{spearman(found[:, 0].numpy(), found[:, -1].numpy()).mean():.2f}"]
        for row, score in rows.items():
            start = time.perf_counter()
            try:
                values = score(of)
            except Exception as error:  # a peer that does not take this network
                say(name, row, f"{type(error).__name__}: {error}")
                cells.append("fails")
                continue
            seconds = time.perf_counter() - start
            predicted = (removed @ values.mT).numpy()
            drawn = bootstrap(predicted[None, None], target, 200)[:, 0]
            cells.append(f"{spearman(predicted, target).mean():.3f} {interval(drawn)} {seconds:.1f} s")
            say(name, row, cells[-1])
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
