"""Measures how well scores predict retraining: the linear datamodeling score (LDS; Park et al. 2023, TRAK).

    python benchmarks/lds.py --data path/to/FashionMNIST/raw --net mlp [--rows defaults peers] [--cache truth.pt]

The data are `--examples` images of a folder in the format of MNIST or, without `--data`, scikit-learn's digits.

- Ground truth: the network is retrained on random halves of the training data, each with several seeds. The loss of
  each query is averaged over the seeds.
- Prediction for a half: the sum of the scores of the training examples that it leaves out.
- LDS: the Spearman correlation of both over the halves, averaged over queries (and over scored models).

Queries are split off from the training data and never trained on. Test images are not used, since this benchmark
chooses the defaults.

Groups of rows (`--rows`):

- `defaults`: `trainer.influence` with its defaults, with other numbers of snapshots, and averaged over three fits.
- `layers`: the same with EK-FAC alone.
- `sketch`: one sketch of the curvature for all queries, and with one setting changed at a time.
- `solve`: the plain least squares of the paper, by tolerance.
- `peers`: other libraries (`pip install kronfluence dattri captum`), as their documentation says.

Brackets are 95 % intervals of a bootstrap over queries and halves. They do not include the variation between scored
models. All rows use the same bootstrap draws, so differences from the first row are more precise than the rows.
`--cache` keeps the losses of the retrained networks, and resumes from them. Prints a Markdown table, whose seconds are
processor time; progress goes to stderr.
"""

from __future__ import annotations

import copy
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import mnist
import numpy as np
import torch
import torch.nn.functional as F
from peers import PEERS
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback, InfluenceReport
from lightning_gif.attribution.lds import spearman as rank_correlation
from lightning_gif.selection.snapshots import Snapshots as Kept

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

Fit = Callable[[TensorDataset, int, list[Any]], tuple[pl.Trainer, pl.LightningModule]]
"""``(data, seed, callbacks) ↦`` a trainer and the model that it trained from its initial weights."""


@dataclass(frozen=True)
class Model:
    """A trained network.

    Attributes:
        trainer: The trainer, with ``influence``.
        callback: The callback of the fit.
        module: The network, in evaluation mode, on the CPU.
        checkpoints: The states of the network after some of the epochs, the last one included.
        four: The snapshots that the callback would have kept with ``snapshots=4``.
        refit: Trains the network with another seed, and returns the trainer.
    """

    trainer: pl.Trainer
    callback: GIFCallback
    module: pl.LightningModule
    checkpoints: list[dict[str, Tensor]]
    four: Kept
    refit: Callable[[int], pl.Trainer]

    def on_its_device(self, *data: TensorDataset) -> tuple[pl.LightningModule, list[TensorDataset]]:
        """A copy of the network and the data, on the trainer's device."""
        device = self.trainer.strategy.root_device
        return copy.deepcopy(self.module).to(device), [
            TensorDataset(*(tensor.to(device) for tensor in part.tensors)) for part in data
        ]


Score = Callable[[Model, TensorDataset, TensorDataset], tuple[Tensor, str]]
"""``(model, train, queries) ↦`` the scores ``(queries, n)``, and a text on their cost."""


class Snapshots(pl.Callback):
    """Keeps the weights of six epochs, spread evenly, for TracIn, and those that ``GIFCallback(snapshots=4)`` keeps."""

    def __init__(self, epochs: int) -> None:
        self.kept: list[dict[str, Tensor]] = []
        self.four = Kept(4)
        self._when = {round((i + 1) * epochs / 6) - 1 for i in range(6)}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.four.add(trainer.current_epoch, pl_module)
        if trainer.current_epoch in self._when:
            self.kept.append({name: value.detach().clone() for name, value in pl_module.state_dict().items()})


def say(*parts: object) -> None:
    print(*parts, file=sys.stderr, flush=True)


def open_task(
    folder: Path | None, net: str, examples: int, queries: int, epochs: int, accelerator: str
) -> tuple[Fit, TensorDataset, TensorDataset]:
    """A function that trains, its training data, and the queries, which are other examples of the training data."""

    def fit_digits(data: TensorDataset, seed: int, callbacks: list[Any]) -> tuple[pl.Trainer, pl.LightningModule]:
        pl.seed_everything(seed, verbose=False)
        options = {"callbacks": callbacks, "enable_progress_bar": False}
        return digits.fit(digits.DigitsModel(), data, epochs=epochs, seed=seed, **options)

    def fit_images(data: TensorDataset, seed: int, callbacks: list[Any]) -> tuple[pl.Trainer, pl.LightningModule]:
        options = {"epochs": epochs, "seed": seed, "net": net, "accelerator": accelerator}
        return mnist.fit(data, callbacks, decay=True, batch_size=64, **options)

    whole, _ = digits.digits() if folder is None else mnist.load(folder)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    asked, trained = order[:queries], order[queries:]
    if folder is not None:
        trained = trained[:examples]
    split = [TensorDataset(*(tensor[chosen] for tensor in whole.tensors)) for chosen in (trained, asked)]
    return (fit_digits if folder is None else fit_images), split[0], split[1]


@torch.no_grad()
def query_losses(model: pl.LightningModule, queries: TensorDataset) -> Tensor:
    """The losses ``(queries,)`` in double precision, since many are near zero."""
    x, y = queries.tensors
    return F.cross_entropy(model.eval()(x).double(), y, reduction="none")


def retrain(
    fit: Fit, train: TensorDataset, queries: TensorDataset, *, subsets: int, seeds: int, cache: Path | None, task: str
) -> tuple[Tensor, Tensor]:
    """A mask ``(subsets, n)`` of the examples left out of each half, and the losses ``(subsets, seeds, queries)``."""
    generator, n = torch.Generator().manual_seed(0), len(train)
    removed = torch.zeros(subsets, n, dtype=torch.float64)
    for row in removed:  # the first halves do not depend on the number of halves
        row[torch.randperm(n, generator=generator)[n // 2 :]] = 1

    losses = torch.empty(0, seeds, len(queries), dtype=torch.float64)
    if cache is not None and cache.exists():
        found = torch.load(cache)
        if found["task"] != task:
            raise SystemExit(f"{cache} has the losses of another task:\n{found['task']}\nThis task is\n{task}")
        losses = found["losses"]
        say(f"{len(losses)} halves are in {cache}.")
    start = time.perf_counter()
    for subset in range(len(losses), subsets):
        kept = removed[subset] == 0
        data = TensorDataset(*(tensor[kept] for tensor in train.tensors))
        runs = []
        for seed in range(seeds):  # no two networks share a seed; the scored ones have the seeds from 0 on
            _, model = fit(data, 1000 + subset * seeds + seed, [])
            runs.append(query_losses(model, queries))
        losses = torch.cat([losses, torch.stack(runs)[None]])
        if cache is not None:
            torch.save({"task": task, "losses": losses}, cache)
        say(f"half {subset + 1} of {subsets}, {time.perf_counter() - start:.0f} s")
    return removed, losses[:subsets]


def report(trainer: pl.Trainer, queries: TensorDataset, **options: Any) -> InfluenceReport:
    return trainer.influence(queries.tensors, per_example=True, unconverged="ignore", **options)


def values_of(report: InfluenceReport) -> Tensor:
    """The scores ``(queries, n)``, in the order of the dataset."""
    values = torch.zeros(report.scores.shape, dtype=torch.float64)
    values[:, report.indices] = report.scores
    return values


def ours(*, four: bool = False, **options: Any) -> Score:
    """The scores of ``trainer.influence``.

    Args:
        four: Whether four snapshots are used, and not those that the callback keeps by default.
        options: Arguments of the call.
    """

    def score(model: Model, train: TensorDataset, queries: TensorDataset) -> tuple[Tensor, str]:
        tracker = model.callback.tracker
        before = tracker.snapshots
        tracker.snapshots = model.four if four else before
        try:
            found = report(model.trainer, queries, **options)
        finally:
            tracker.snapshots = before
        products = sum(solution.hvps for solution in found.solutions) / len(found.solutions)
        products_of = f"{products:.3g} products a query, " if products else ""
        states = 1 + len(found.settings["snapshots"])
        return values_of(found), f"{products_of}damping {found.settings['damping']:.2g}, states {states}"

    return score


def ensemble(model: Model, train: TensorDataset, queries: TensorDataset) -> tuple[Tensor, str]:
    """The mean of the scores of three fits, with two other seeds than that of the scored network."""
    start = time.process_time()
    trainers = [model.trainer, *map(model.refit, (1, 2))]
    seconds = time.process_time() - start
    mean = InfluenceReport.mean([report(trainer, queries) for trainer in trainers])
    return values_of(mean), f"two more fits, {seconds:.0f} of the seconds"


def theirs(function: Callable[..., Tensor]) -> Score:
    """The scores of another library."""

    def score(model: Model, train: TensorDataset, queries: TensorDataset) -> tuple[Tensor, str]:
        module, data = model.on_its_device(train, queries)
        return function(module, *data, checkpoints=model.checkpoints).double(), ""

    return score


SKETCH: dict[str, Any] = {"solver": "nystrom", "max_iter": 512, "snapshots": False}

DEFAULTS: dict[str, Score] = {
    "defaults": ours(),
    "the last state only, `snapshots=False`": ours(snapshots=False),
    "five states, `GIFCallback(snapshots=4)`": ours(four=True),
    "three fits, `InfluenceReport.mean`": ensemble,
}

LAYERS: dict[str, Score] = {
    "`solver='ekfac'`": ours(solver="ekfac"),
    "the last state only, `solver='ekfac', snapshots=False`": ours(solver="ekfac", snapshots=False),
    "five states, `solver='ekfac'`, `GIFCallback(snapshots=4)`": ours(solver="ekfac", four=True),
}

ROWS: dict[str, dict[str, Score]] = {
    "defaults": DEFAULTS,
    "layers": LAYERS,
    "sketch": {
        "`solver='nystrom', max_iter=512, snapshots=False`": ours(**SKETCH),
        "five states, `GIFCallback(snapshots=4)`": ours(**{**SKETCH, "snapshots": True}, four=True),
        "each query on its own (`solver='cg'`)": ours(solver="cg", snapshots=False),
        "`solver='cg', max_iter=10`": ours(solver="cg", max_iter=10, snapshots=False),
        "`solver='cg', max_iter=5`": ours(solver="cg", max_iter=5, snapshots=False),
        "`max_iter=128`": ours(**{**SKETCH, "max_iter": 128}),
        "`max_iter=64`": ours(**{**SKETCH, "max_iter": 64}),
        **{f"`damping={value:g}`": ours(**SKETCH, damping=value) for value in (1.0, 0.3, 0.1, 0.03, 0.01)},
        "`curvature_examples=512`": ours(**SKETCH, curvature_examples=512),
        "all examples (`curvature_examples=None`)": ours(**SKETCH, curvature_examples=None),
        "`curvature='hessian', damping=0.03`": ours(curvature="hessian", damping=0.03, snapshots=False),
        "a tenth of the neurons (`targets='cached'`)": ours(**SKETCH, targets="cached"),
        "`targets='cached', ratio=0.5`": ours(**SKETCH, targets="cached", ratio=0.5),
        "`method='gif'`": ours(method="gif", snapshots=False),
    },
    "solve": {
        f"`method='gif', rtol={rtol:g}`": ours(method="gif", rtol=rtol, snapshots=False)
        for rtol in (1e-1, 1e-2, 1e-3, 1e-4)
    },
    "peers": {**DEFAULTS, **{name: theirs(function) for name, function in PEERS.items()}},
}


def spearman(predicted: Any, truth: Any) -> Any:
    """Spearman's correlation over subsets: ``(…, subsets, queries), (subsets, queries) → (…, queries)``."""
    return rank_correlation(torch.as_tensor(predicted), torch.as_tensor(truth)).numpy()


def bootstrap(predicted: Any, truth: Any, draws: int) -> Any:
    """The LDS of every row, ``(draws, rows)``, with subsets and queries drawn with replacement."""
    generator, (subsets, queries) = np.random.default_rng(0), truth.shape
    found = []
    for _ in range(draws):
        some, asked = generator.integers(subsets, size=subsets), generator.integers(queries, size=queries)
        drawn = spearman(predicted[:, :, some][..., asked], truth[some][:, asked])
        found.append(drawn.mean(axis=(1, 2)))
    return np.stack(found)


def interval(values: Any, signed: bool = False) -> str:
    low, high = np.percentile(values, [2.5, 97.5])
    return f"[{low:+.3f}, {high:+.3f}]" if signed else f"[{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, help="folder with the four gzipped idx files; without it, scikit-learn's digits"
    )
    parser.add_argument("--net", default="mlp", choices=list(mnist.NETS), help="the network, with --data")
    parser.add_argument("--rows", nargs="+", default=["defaults"], choices=list(ROWS), help="groups of rows")
    parser.add_argument("--only", nargs="+", help="only the first row, and rows whose names contain one of these words")
    parser.add_argument("--examples", type=int, default=5000, help="training examples, with --data")
    parser.add_argument("--epochs", type=int, default=15, help="training epochs")
    parser.add_argument("--queries", type=int, default=40, help="queries, split off from the training data")
    parser.add_argument("--subsets", type=int, default=60, help="random halves of the training data")
    parser.add_argument("--seeds", type=int, default=2, help="trainings on each half")
    parser.add_argument("--models", type=int, default=1, help="models to score, trained with different seeds")
    parser.add_argument("--cache", type=Path, help="file for the losses of the retrained networks")
    parser.add_argument("--accelerator", default="cpu", help="accelerator of trainings and scores, with --data")
    parser.add_argument("--draws", type=int, default=1000, help="draws of the bootstrap")
    options = parser.parse_args()
    digits.quiet()
    if options.data is None and options.accelerator != "cpu":
        parser.error("--accelerator needs --data; the digits are trained on the CPU")

    fit, train, queries = open_task(
        options.data, options.net, options.examples, options.queries, options.epochs, options.accelerator
    )
    name = "digits" if options.data is None else f"{options.data.resolve().parent.name}, {options.net}"
    task = f"{name}, {len(train)} examples, {len(queries)} queries, {options.epochs} epochs"
    removed, losses = retrain(
        fit,
        train,
        queries,
        subsets=options.subsets,
        seeds=options.seeds,
        cache=options.cache,
        task=f"{task}, {options.seeds} seeds",
    )
    truth = losses.mean(dim=1).numpy()

    models = []
    for seed in range(options.models):
        snapshots, callback = Snapshots(options.epochs), GIFCallback()
        trainer, module = fit(train, seed, [callback, snapshots])

        def refit(other: int, seed: int = seed) -> pl.Trainer:
            return fit(train, seed + 100 * other, [GIFCallback()])[0]

        models.append(Model(trainer, callback, module.eval(), snapshots.kept, snapshots.four, refit))
        right = (module(queries.tensors[0]).argmax(1) == queries.tensors[1]).double().mean()
        loss = query_losses(module, queries).mean()
        say(f"model {seed}: {100 * float(right):.1f} % of the queries are correct, mean loss {float(loss):.4f}")

    rows = {name: score for group in options.rows for name, score in ROWS[group].items()}
    first = next(iter(rows))
    if options.only:
        rows = {n: score for n, score in rows.items() if n == first or any(word in n for word in options.only)}
    # (rows, models, subsets, queries): scores are changes by removal, so those of the removed examples are summed.
    predicted, costs, seconds = [], [], []
    for name, score in rows.items():
        start = time.process_time()
        found = [score(model, train, queries) for model in models]
        seconds.append((time.process_time() - start) / len(models))
        predicted.append(np.stack([(removed @ values.double().mT).numpy() for values, _ in found]))
        costs.append(found[0][1])
        say(f"{name}: {spearman(predicted[-1], truth).mean():.3f}, {seconds[-1]:.0f} s")
    lds = spearman(np.stack(predicted), truth).mean(axis=(1, 2))
    drawn = bootstrap(np.stack(predicted), truth, options.draws)

    print(f"{task}; {options.subsets} halves with {options.seeds} seeds each; {options.models} model(s) scored.")
    if options.seeds > 1:
        half = options.seeds // 2
        agreement = spearman(losses[:, :half].mean(dim=1).numpy(), losses[:, half:].mean(dim=1).numpy()).mean()
        print(f"The losses of the first and second half of the seeds correlate by {agreement:.2f} (Spearman).")
    print("\n| setting | LDS | difference from the first row | cost | seconds |\n| --- | --- | --- | --- | --- |")
    for position, name in enumerate(rows):
        difference = f"{lds[position] - lds[0]:+.3f} {interval(drawn[:, position] - drawn[:, 0], signed=True)}"
        cells = (
            name,
            f"{lds[position]:.3f} {interval(drawn[:, position])}",
            difference if position else "",
            costs[position],
            f"{seconds[position]:.0f}",
        )
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
