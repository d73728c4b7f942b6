"""Measures how well scores through training predict the recorded run, and what they cost.

    python benchmarks/through_training.py --data path/to/FashionMNIST/raw [--only "regression" …] [--draws 16]

Each training is recorded and scored for 40 queries. Then it is replayed without random examples: the same seed and
batches, with weight 0 for 1 %, 5 % or 50 % of the examples. A correlation is that of Spearman between the sum of their
scores and the change of the query's loss, over the draws, averaged over the queries. The other scores are of the model
at the end of its training: the default ones, those of EK-FAC alone, and those by conjugate gradients. Smoothness
compares the change of the weights up to weight 1/2 with that from there to 0.

Prints two Markdown tables. Seconds are processor time on one thread, and costs are multiples of those of the fit
without a record. With `--draws 0` only costs are measured.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lds import say
from mnist import load
from sklearn import datasets
from tasks import Transformer, chains
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback
from lightning_gif.attribution.lds import spearman
from lightning_gif.trajectory.leaving_out import draws, leave_out
from lightning_gif.trajectory.record import Trajectory
from lightning_gif.trajectory.replay import Replay

QUERIES = 40

SHARES = (0.05, 0.01, 0.5)

# The scores of the model at the end of its training.
AT_THE_END: dict[str, dict[str, Any]] = {
    "default": {},
    "EK-FAC": {"solver": "ekfac"},
    "conjugate gradients": {"solver": "cg"},
}


class Module(pl.LightningModule):
    """A classifier for integer targets, and a regression for others."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        predicted = self.net(batch[0])
        if batch[1].is_floating_point():
            return F.mse_loss(predicted.squeeze(1), batch[1])
        return F.cross_entropy(predicted, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def diabetes(folder: Path, count: int | None) -> tuple[Tensor, Tensor]:
    found = datasets.load_diabetes()
    x, y = (torch.tensor(values, dtype=torch.float32) for values in (found.data, found.target))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:count]
    return ((x - x.mean(0)) / x.std(0))[order], ((y - y.mean()) / y.std())[order]


def fashion(folder: Path, count: int | None, *, examples: int, flat: bool) -> tuple[Tensor, Tensor]:
    images, labels = load(folder)[0].tensors
    small = F.avg_pool2d(images[: count or examples + QUERIES], 2)
    return small.flatten(1) if flat else small, labels[: len(small)]


def texts(folder: Path, count: int | None) -> tuple[Tensor, Tensor]:
    return chains({}, count or 1000 + QUERIES)


def perceptron(inputs: int, outputs: int, activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, outputs))


def convolutions(activation: type[nn.Module], *, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [activation()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


@dataclass(frozen=True)
class Training:
    """A network and how it is trained."""

    data: Callable[..., tuple[Tensor, Tensor]]
    net: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    batch_size: int
    epochs: int


ADAMW = partial(torch.optim.AdamW, lr=3e-3)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
SLOW = partial(torch.optim.SGD, lr=0.005, momentum=0.9)
IMAGES, ROWS = (partial(fashion, examples=1000, flat=flat) for flat in (False, True))

TRAININGS: dict[str, Training] = {
    "regression, SiLU, AdamW": Training(diabetes, partial(perceptron, 10, 1, nn.SiLU), ADAMW, 32, 30),
    "regression, ReLU, AdamW": Training(diabetes, partial(perceptron, 10, 1, nn.ReLU), ADAMW, 32, 30),
    "CNN, GELU, AdamW": Training(IMAGES, partial(convolutions, nn.GELU), ADAMW, 64, 20),
    "CNN, GELU, BatchNorm, AdamW": Training(IMAGES, partial(convolutions, nn.GELU, norm=True), ADAMW, 64, 20),
    "transformer, ReLU, AdamW": Training(texts, Transformer, partial(torch.optim.AdamW, lr=2e-3), 64, 12),
    "MLP, ReLU, SGD 0.05": Training(ROWS, partial(perceptron, 196, 10, nn.ReLU), SGD, 64, 30),
    "MLP, GELU, SGD 0.05": Training(ROWS, partial(perceptron, 196, 10, nn.GELU), SGD, 64, 30),
    "MLP, ReLU, SGD 0.005": Training(ROWS, partial(perceptron, 196, 10, nn.ReLU), SLOW, 64, 30),
    "MLP, ReLU, SGD 0.05, batch 500": Training(ROWS, partial(perceptron, 196, 10, nn.ReLU), SGD, 500, 120),
}


def fitted(
    training: Training, data: TensorDataset, folder: str | None
) -> tuple[pl.Trainer, GIFCallback, pl.LightningModule, float]:
    """A trained module with its trainer, and the seconds of the fit; recorded in ``folder`` if given."""
    pl.seed_everything(0, verbose=False)
    module = Module(training.net(), training.optimizer)
    callback = GIFCallback(trajectory=folder)
    trainer = pl.Trainer(
        max_epochs=training.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    begin = time.process_time()
    trainer.fit(module, DataLoader(data, training.batch_size, shuffle=True))
    return trainer, callback, module, time.process_time() - begin


def measure(name: str, folder: Path, count: int, examples_used: int | None) -> tuple[str, list[str]]:
    """The row of a training in the table of costs, and its rows in that of correlations."""
    training = TRAININGS[name]
    x, y = training.data(folder, examples_used)
    asked = min(QUERIES, len(x) // 4)
    query, data = (x[:asked], y[:asked]), TensorDataset(x[asked:], y[asked:])
    plain = fitted(training, data, None)[3]
    with tempfile.TemporaryDirectory() as record:
        trainer, callback, _, recorded = fitted(training, data, record)
        options: dict[str, Any] = {"through": "training", "per_example": True}
        times = [time.process_time()]
        for number in (1, asked):
            report = trainer.influence((query[0][:number], query[1][:number]), **options)
            times.append(time.process_time())
        rows = []
        if count:
            others = [trainer.influence(query, per_example=True, **given).scores for given in AT_THE_END.values()]
            with callback.open_session(callback.settings, "batch") as session:
                replay = Replay(session.objective, session.train, Trajectory.open(Path(record)))
                examples = session.examples(query)
                for share in SHARES:
                    test = leave_out(replay, examples, report.scores, count, per_example=True, share=share)
                    found = [test.correlation or 0.0]
                    for scores in others:
                        sets = draws(len(data), count, share)
                        predicted = torch.stack([scores[:, chosen].sum(1) for chosen in sets], 1)
                        found.append(spearman(predicted, test.measured, dim=1).mean().item())
                    found += [test.mean_smoothness, test.measured.abs().median().item()]
                    cells = [name, f"{100 * share:g} %", *(f"{value:.3f}" for value in found)]
                    rows.append(f"| {' | '.join(cells)} |")
    steps = report.settings["steps"]
    costs = (recorded / plain, (times[1] - times[0]) / plain, (times[2] - times[1]) / plain)
    cells = [name, str(steps), f"{plain:.1f}", *(f"{cost:.2f}" for cost in costs)]
    return f"| {' | '.join(cells)} |", rows


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--only", nargs="*", default=list(TRAININGS), help="measure these trainings only")
    parser.add_argument("--draws", type=int, default=16, help="replays without random examples, for each share")
    parser.add_argument("--examples", type=int, help="use only so many examples (for a quick test)")
    parser.add_argument("--epochs", type=int, help="train only so many epochs (for a quick test)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    columns = ["training", "left out", "through training", *AT_THE_END, "smoothness", "change"]
    heads = ["training", "steps", "seconds", "recorded", "1 query", f"{QUERIES} queries"]
    costs = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    if options.draws:
        print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for name in options.only:
        if options.epochs is not None:
            training = TRAININGS[name]
            TRAININGS[name] = Training(*list(vars(training).values())[:4], options.epochs)
        say(name)
        cost, rows = measure(name, options.data, options.draws, options.examples)
        costs.append(cost)
        for row in rows:
            print(row, flush=True)
    print("\n" * bool(options.draws) + "\n".join(costs))


if __name__ == "__main__":
    main()
