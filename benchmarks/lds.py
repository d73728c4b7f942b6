"""What the solve's tolerance buys for influence, by the linear datamodeling score (LDS; Park et al. 2023, TRAK).

    python benchmarks/lds.py [--data path/to/MNIST/raw] [--cache truth.pt]

Scikit-learn's digits with the net of the examples, or `--examples` images of an MNIST-like folder with TinyNet. The
truth: the net is trained anew on random halves of the training data, each with several seeds, and each query's loss is
averaged over the seeds. The prediction for a half: the sum of the scores of the examples that it lacks. The LDS is the
Spearman correlation of both over the halves, averaged over queries (and over the models that were scored). Queries are
split off from the training data and never trained on; no test image is looked at, since defaults are chosen by this.

Brackets are 95 % intervals of a bootstrap over queries and halves together; that the scored models are few is not in
them. All rows are judged on the same draws, so that differences between rows are known more closely than the rows
themselves: the last column has them, to the row of the tightest tolerance. `--cache` keeps the losses of the retrained
nets and goes on from them. Prints a Markdown table; progress goes to stderr.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import mnist
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import GIFCallback

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

Fit = Callable[[TensorDataset, int, list[Any]], tuple[pl.Trainer, pl.LightningModule]]
"""``(data, seed, callbacks) ↦`` a trainer with the model that it trained from the start."""


@dataclass(frozen=True)
class Row:
    """What is asked of ``trainer.influence``."""

    method: str
    solver: str
    damping: float
    rtol: float


@dataclass
class Scores:
    """The answer: scores ``(models, queries, n)``, and how the solves went."""

    values: Tensor
    products: list[int]
    converged: list[bool]


def say(*parts: object) -> None:
    print(*parts, file=sys.stderr, flush=True)


def open_task(
    folder: Path | None, examples: int, queries: int, epochs: int
) -> tuple[Fit, TensorDataset, TensorDataset]:
    """How to train, on what, and the queries, which are other examples of the training data."""

    def fit_digits(data: TensorDataset, seed: int, callbacks: list[Any]) -> tuple[pl.Trainer, pl.LightningModule]:
        pl.seed_everything(seed, verbose=False)
        options = {"callbacks": callbacks, "enable_progress_bar": False}
        return digits.fit(digits.DigitsModel(), data, epochs=epochs, seed=seed, **options)

    def fit_tinynet(data: TensorDataset, seed: int, callbacks: list[Any]) -> tuple[pl.Trainer, pl.LightningModule]:
        return mnist.fit(data, callbacks, epochs=epochs, seed=seed)

    whole, _ = digits.digits() if folder is None else mnist.load(folder)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    asked, trained = order[:queries], order[queries:]
    if folder is not None:
        trained = trained[:examples]
    split = [TensorDataset(*(tensor[chosen] for tensor in whole.tensors)) for chosen in (trained, asked)]
    return (fit_digits if folder is None else fit_tinynet), split[0], split[1]


@torch.no_grad()
def query_losses(model: pl.LightningModule, queries: TensorDataset) -> Tensor:
    """``(queries,)``, in double precision: many are near zero."""
    x, y = queries.tensors
    return F.cross_entropy(model.eval()(x).double(), y, reduction="none")


def retrain(
    fit: Fit, train: TensorDataset, queries: TensorDataset, *, subsets: int, seeds: int, cache: Path | None, task: str
) -> tuple[Tensor, Tensor]:
    """What each half lacks, ``(subsets, n)`` of zeros and ones, and the losses ``(subsets, seeds, queries)``."""
    generator, n = torch.Generator().manual_seed(0), len(train)
    removed = torch.zeros(subsets, n, dtype=torch.float64)
    for row in removed:  # the first halves are the same however many there are
        row[torch.randperm(n, generator=generator)[n // 2 :]] = 1

    losses = torch.empty(0, seeds, len(queries), dtype=torch.float64)
    if cache is not None and cache.exists():
        found = torch.load(cache)
        if found["task"] != task:
            raise SystemExit(f"{cache} has the losses of another task:\n{found['task']}\nasked is\n{task}")
        losses = found["losses"]
        say(f"{len(losses)} halves are in {cache}.")
    start = time.perf_counter()
    for subset in range(len(losses), subsets):
        kept = removed[subset] == 0
        data = TensorDataset(*(tensor[kept] for tensor in train.tensors))
        runs = []
        for seed in range(seeds):  # no two nets share one; the scored ones have the seeds from 0 on
            _, model = fit(data, 1000 + subset * seeds + seed, [])
            runs.append(query_losses(model, queries))
        losses = torch.cat([losses, torch.stack(runs)[None]])
        if cache is not None:
            torch.save({"task": task, "losses": losses}, cache)
        say(f"half {subset + 1} of {subsets}, {time.perf_counter() - start:.0f} s")
    return removed, losses[:subsets]


def score(trainers: list[pl.Trainer], queries: TensorDataset, row: Row, n: int, max_iter: int) -> Scores:
    """The scores of one row, of every model."""
    start = time.perf_counter()
    scores = Scores(torch.zeros(len(trainers), len(queries), n, dtype=torch.float64), [], [])
    options: dict[str, Any] = {"per_example": True, "max_iter": max_iter, "unconverged": "ignore"}
    for trainer, values in zip(trainers, scores.values, strict=True):
        report = trainer.influence(queries.tensors, **asdict(row), **options)
        values[:, report.indices] = report.scores
        scores.products += [solution.hvps for solution in report.solutions]
        scores.converged += [solution.converged for solution in report.solutions]
    say(f"{row}: {median(scores.products):g} products, {time.perf_counter() - start:.0f} s")
    return scores


def correlation(a: Any, b: Any, axis: int) -> Any:
    """Pearson's, along an axis; 0 where one of both does not vary."""
    a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
    scale = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return (a * b).sum(axis) / np.where(scale > 0, scale, 1)


def spearman(predicted: Any, truth: Any) -> Any:
    """Over subsets: ``(…, subsets, queries)`` and ``(subsets, queries) → (…, queries)``."""
    return correlation(rankdata(predicted, axis=-2), rankdata(truth, axis=-2), axis=-2)


def bootstrap(predicted: Any, truth: Any, draws: int) -> Any:
    """LDS of every row, ``(draws, rows)``, for subsets and queries drawn with replacement."""
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
    parser.add_argument("--data", type=Path, help="folder with the four idx files; without it, the digits")
    parser.add_argument("--examples", type=int, default=5000, help="training examples, with --data")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--subsets", type=int, default=50, help="random halves of the training data")
    parser.add_argument("--seeds", type=int, default=2, help="trainings on each half")
    parser.add_argument("--models", type=int, default=1, help="models to score, trained with different seeds")
    parser.add_argument("--cache", type=Path, help="file for the losses of the retrained nets")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--solvers", nargs="+", default=["lsmr"])
    parser.add_argument("--rtol", type=float, nargs="+", default=[1e-1, 3e-2, 1e-2, 1e-3, 1e-4])
    parser.add_argument("--damping", type=float, nargs="*", default=[0.01, 0.03, 0.1], help="of the second block")
    parser.add_argument("--full-damping", type=float, nargs="*", default=[0.03], help="of the method 'if'")
    parser.add_argument("--damped-rtol", type=float, default=1e-2, help="of the rows with damping")
    parser.add_argument("--max-iter", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    options = parser.parse_args()
    digits.quiet()

    fit, train, queries = open_task(options.data, options.examples, options.queries, options.epochs)
    name = "digits" if options.data is None else options.data.resolve().parent.name
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

    trainers = []
    for seed in range(options.models):
        trainer, model = fit(train, seed, [GIFCallback(ratio=options.ratio)])
        trainers.append(trainer)
        right = (model.eval()(queries.tensors[0]).argmax(1) == queries.tensors[1]).double().mean()
        loss = query_losses(model, queries).mean()
        say(f"model {seed}: {100 * float(right):.1f} % of the queries right, mean loss {float(loss):.4f}")

    solver, rtol = options.solvers[0], options.damped_rtol
    tightest = Row("gif", solver, 0.0, min(options.rtol))
    rows = [Row("gif", name, 0.0, value) for name in options.solvers for value in options.rtol]
    rows += [Row("gif", solver, damping, rtol) for damping in options.damping]
    rows += [Row("if", solver, damping, rtol) for damping in options.full_damping]
    rows = list(dict.fromkeys(rows))
    scores = {row: score(trainers, queries, row, len(train), options.max_iter) for row in rows}

    # (rows, models, subsets, queries): a score is the change by removal, so the removed ones count, with their sign.
    predicted = np.stack([(removed @ found.values.mT).numpy() for found in scores.values()])
    lds = spearman(predicted, truth).mean(axis=(1, 2))
    drawn = bootstrap(predicted, truth, options.draws)
    base = list(scores).index(tightest)

    print(f"{task}; {options.subsets} halves with {options.seeds} seeds each; {options.models} model(s) scored.")
    if options.seeds > 1:
        half = options.seeds // 2
        agreement = spearman(losses[:, :half].mean(dim=1).numpy(), losses[:, half:].mean(dim=1).numpy()).mean()
        print(f"Losses by one half of the seeds and by the other agree to {agreement:.2f} (Spearman).")
    print(
        "\n| method | solver | damping | rtol | LDS | Hessian products a query | converged (%)"
        " | correlation with the tightest | LDS less that of the tightest |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    reference = scores[tightest].values.numpy()
    for position, (row, found) in enumerate(scores.items()):
        alike = np.median(correlation(found.values.numpy(), reference, axis=-1))
        difference = f"{lds[position] - lds[base]:+.3f} {interval(drawn[:, position] - drawn[:, base], signed=True)}"
        cells = (
            *(row.method, row.solver, f"{row.damping:g}", f"{row.rtol:g}"),
            *(f"{lds[position]:.3f} {interval(drawn[:, position])}", f"{median(found.products):g}"),
            *(f"{100 * sum(found.converged) / len(found.converged):.0f}", f"{alike:.3f}"),
            difference if row != tightest else "",
        )
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
