"""Reproduces the three tables of the GIF paper by its protocol and by ours, beside the numbers of its notebooks.

    python benchmarks/paper.py --table 2 --data MNIST/raw

The paper's protocol uses test images. It takes the curvature over a test batch (table 3: over training images). It
scales the change to a fixed length and applies it again and again. It keeps the model with the best F1 on test images
(table 3: on training images). Ours is `trainer.unlearn` with the same method, selector and ratio. It uses training
images only.

The paper's networks and data (VGG-11 on CIFAR-10, ResNet-18) are unavailable or too large for two cores. `--net` takes
their place. So the columns of the notebooks show the magnitude and the order of the rows, not values to reach.

Prints a Markdown table. Cells are two accuracies in percent and the F1.
"""

from __future__ import annotations

import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import harmonic_mean, mean
from typing import Any

import torch
from backdoor import LABEL, TRIGGERS
from evidence import say, table, timed
from mnist import NETS, TinyNet, accuracy, fit, load
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback

_RATIOS = (0.02, 0.05, 0.11, 0.2)  # of table 1

_REMOVED = 0  # the class of tables 1 and 2

# The paper's protocol evaluates the model on this many images of each set after each repetition. Reports use all.
_WATCHED = 1000


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: The name of the row.
        options: The arguments of the edit.
        notebook: The values in the notebooks' outputs: two accuracies in percent, and F1; ``None`` if they have none.
    """

    name: str
    options: dict[str, Any]
    notebook: tuple[float, float, float] | None


def _selectors() -> Iterator[Row]:
    """The rows of table 1: VGG-11 on CIFAR-10, means of the 30 runs in the notebook."""
    for selector, by_ratio in {
        "highest_k_outputs": (
            (89.56, 0.13, 0.9443),
            (90.90, 0.08, 0.9520),
            (89.59, 0.16, 0.9443),
            (87.16, 0.20, 0.9304),
        ),
        "highest_k_gradients": (
            (85.31, 0.14, 0.9181),
            (90.73, 0.09, 0.9510),
            (90.30, 0.09, 0.9486),
            (89.44, 0.17, 0.9435),
        ),
        "random": ((83.86, 0.20, 0.9111), (84.87, 0.18, 0.9172), (85.06, 0.14, 0.9186), (85.75, 0.21, 0.9222)),
        "lowest_k_outputs": (
            (40.41, 0.22, 0.5224),
            (40.46, 0.21, 0.5719),
            (67.89, 0.20, 0.8002),
            (81.01, 0.16, 0.8931),
        ),
        "lowest_k_gradients": (
            (43.85, 0.31, 0.6004),
            (48.27, 0.26, 0.6450),
            (52.75, 0.17, 0.6809),
            (54.58, 0.12, 0.6994),
        ),
    }.items():
        for ratio, found in zip(_RATIOS, by_ratio, strict=True):
            yield Row(f"{selector}, {100 * ratio:g} %", {"selector": selector, "ratio": ratio}, found)
    for selector in ("caps", "ekfac_caps"):  # newer than the paper
        for ratio in _RATIOS:
            yield Row(f"{selector}, {100 * ratio:g} %", {"selector": selector, "ratio": ratio}, None)
    yield Row("all parameters", {"method": "if"}, (78.78, 0.15, 0.8801))


def _methods() -> Iterator[Row]:
    """The rows of table 2: ResNet-18 on MNIST, means of ten runs."""
    for ratio, by_method in {
        0.1: ((99.17, 0.03, 0.9957), (99.13, 0.05, 0.9954), (98.85, 0.04, 0.9940)),
        0.3: ((98.98, 0.11, 0.9943), (98.93, 0.04, 0.9944), (98.61, 0.14, 0.9923)),
        0.5: ((98.17, 0.22, 0.9897), (98.77, 0.01, 0.9938), (97.43, 0.20, 0.9859)),
    }.items():
        for method, found in zip(("gif", "fif", "pif"), by_method, strict=True):
            options = {"method": method, "selector": "highest_k_gradients", "ratio": ratio}
            yield Row(f"{method}, {100 * ratio:g} %", options, found)


def _relabelling() -> Iterator[Row]:
    """The rows of table 3: TinyNet on MNIST, means of ten runs, accuracies on clean and corrected training images."""
    common = {"selector": "highest_k_outputs", "ratio": 0.05}
    yield Row("gif, 5 %", {"method": "gif", **common}, (98.26, 95.38, 0.9680))
    yield Row("fif, 5 %", {"method": "fif", **common}, (91.05, 88.76, 0.8989))
    yield Row("pif, 5 %", {"method": "pif", **common}, (95.78, 92.30, 0.9401))
    yield Row("if", {"method": "if"}, (97.84, 93.25, 0.9549))
    yield Row("sif", {"method": "sif"}, (98.23, 86.30, 0.9188))


@dataclass(frozen=True)
class Problem:
    """The data and the protocol of a table.

    Attributes:
        rows: The rows of the table.
        data: The training images, with the labels that the network is trained with.
        sample: A function from a seed to the arguments of the edit in the paper's protocol.
        whole: The arguments of our edit.
        steps: The maximal number of iterations of the paper's recursion.
        length: The length to which the paper scales a change.
        slows: Whether the paper applies a third of the change while F1 is at least 0.85.
        patience: The number of repetitions without a better F1 after which the paper stops. ``None``: it stops when the
            accuracy on the class is below 0.1 %.
        watched: The two sets that the paper's protocol evaluates on.
        judged: The two sets that the report evaluates on, with the same names.
        score: The F1 of the two accuracies.
    """

    rows: list[Row]
    data: TensorDataset
    sample: Callable[[int], dict[str, Any]]
    whole: dict[str, Any]
    steps: int
    length: float
    slows: bool
    patience: int | None
    watched: dict[str, TensorDataset]
    judged: dict[str, TensorDataset]
    score: Callable[[float, float], float]


def removal(number: int, folder: Path) -> Problem:
    """Tables 1 and 2: class 0 is removed."""
    train, test = load(folder)
    images, labels = test.tensors
    source = train if number == 1 else test  # the paper takes its forget images from here
    theirs = (source.tensors[1] == _REMOVED).nonzero().squeeze(1)
    first = labels[:512] != _REMOVED
    keep = DataLoader(TensorDataset(images[:512][first], labels[:512][first]), 256)
    count = 1024 if number == 1 else 512

    def sample(seed: int) -> dict[str, Any]:
        chosen = theirs[torch.randperm(len(theirs), generator=torch.Generator().manual_seed(seed))[:count]]
        return {"batch": tuple(tensor[chosen] for tensor in source.tensors), "retain": keep}

    judged = {"others": _where(test, labels != _REMOVED), "class": _where(test, labels == _REMOVED)}
    return Problem(
        rows=list(_selectors() if number == 1 else _methods()),
        data=train,
        sample=sample,
        whole={"batch": (train.tensors[1] == _REMOVED).nonzero().squeeze(1).tolist()},
        steps=200 if number == 1 else 30,
        length=0.06 if number == 1 else 0.03,
        slows=number == 2,
        patience=None,
        watched={name: _few(part) for name, part in judged.items()},
        judged=judged,
        score=lambda others, gone: harmonic_mean([others, 1 - gone]),
    )


def relabelling(folder: Path) -> Problem:
    """Table 3: labels are corrected on the tenth of the images that has the checkerboard. Reports use test images."""
    clean, test = load(folder)
    put, share = TRIGGERS["checkerboard"]
    chosen = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))[: round(share * len(clean))]
    chosen = chosen.sort().values
    images, labels = (tensor.clone() for tensor in clean.tensors)
    images[chosen] = put(images[chosen])
    poisoned = labels.clone()
    poisoned[chosen] = LABEL
    others = torch.ones(len(clean), dtype=torch.bool)
    others[chosen] = False
    rest = others.nonzero().squeeze(1)[: 4 * 512]
    keep = DataLoader(TensorDataset(images[rest], labels[rest]), 256)

    def sample(seed: int) -> dict[str, Any]:
        part = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[: 8 * 512]]
        return {"batch": (images[part], poisoned[part]), "relabel": labels[part], "retain": keep}

    right = TensorDataset(images, labels)
    return Problem(
        rows=list(_relabelling()),
        data=TensorDataset(images, poisoned),
        sample=sample,
        whole={"batch": chosen.tolist(), "relabel": labels[chosen]},
        steps=1000,
        length=0.3,
        slows=False,
        patience=10,
        watched={"clean": _few(_where(right, others)), "corrected": _few(_where(right, ~others))},
        judged={"clean": test, "corrected": TensorDataset(put(test.tensors[0]), test.tensors[1])},
        score=lambda clean, corrected: harmonic_mean([clean, corrected]),
    )


def _where(data: TensorDataset, chosen: Tensor) -> TensorDataset:
    return TensorDataset(*(tensor[chosen] for tensor in data.tensors))


def _few(data: TensorDataset) -> TensorDataset:
    return TensorDataset(*(tensor[:_WATCHED] for tensor in data.tensors))


def _shares(model: TinyNet, sets: dict[str, TensorDataset]) -> tuple[float, float]:
    one, other = (accuracy(model, part, torch.ones(len(part), dtype=torch.bool)) for part in sets.values())
    return one, other


def repeated(trainer: Any, model: TinyNet, problem: Problem, row: Row, seed: int, steps: int) -> tuple[float, float]:
    """The paper's protocol: two accuracies of the model with the best F1 on the watched sets.

    Args:
        trainer: The trainer that the callback is bound to.
        model: The trained network. It is not changed.
        problem: The data and the protocol of the table.
        row: The row of the table.
        seed: The seed that draws the forget images.
        steps: The iterations of the paper's recursion.
    """
    before = [weight.detach().clone() for weight in model.parameters()]
    edit = trainer.unlearn(
        **problem.sample(seed),
        **row.options,
        step="natural",
        solver="plain_lissa",
        max_iter=steps,
        curvature_examples=None,
        unseen=False,
    )
    changes = [weight.detach() - old for weight, old in zip(model.parameters(), before, strict=True)]
    edit.undo()
    size = problem.length / float(torch.cat([change.flatten() for change in changes]).norm())
    best, kept, since, score = -1.0, before, 0, 0.0
    for _ in range(200):
        share = 1 / 3 if problem.slows and score >= 0.85 else 1.0
        with torch.no_grad():
            for weight, change in zip(model.parameters(), changes, strict=True):
                weight += share * size * change
        one, other = _shares(model, problem.watched)
        score, since = problem.score(one, other), since + 1
        if score > best:
            best, kept, since = score, [weight.detach().clone() for weight in model.parameters()], 0
        if since >= problem.patience if problem.patience else other < 0.001:
            break
    _put(model, kept)
    found = _shares(model, problem.judged)
    _put(model, before)
    return found


def _put(model: TinyNet, weights: list[Tensor]) -> None:
    with torch.no_grad():
        for weight, value in zip(model.parameters(), weights, strict=True):
            weight.copy_(value)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, choices=[1, 2, 3], required=True, help="the table of the paper")
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--net", default="tinynet", choices=list(NETS), help="the network")
    parser.add_argument("--epochs", type=int, default=10, help="training epochs")
    parser.add_argument("--runs", type=int, default=3, help="draws of forget images, in the paper's protocol")
    parser.add_argument("--solve_steps", type=int, help="iterations of the paper's recursion; default: as in the paper")
    parser.add_argument("--rows", type=int, help="number of rows to compute, from the first; default: all")
    parser.add_argument(
        "--ratios", type=float, nargs="+", help="only the rows with these ratios, and those without one"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*still predicted as it.*|.*not found in the training data.*")

    problem = relabelling(options.data) if options.table == 3 else removal(options.table, options.data)
    callback = GIFCallback(unconverged="ignore")
    trainer, model = fit(problem.data, [callback], epochs=options.epochs, net=options.net, decay=True)
    names = list(problem.judged)
    say(f"before: {_shares(model, problem.judged)} ({names})")
    found = []
    rows = [
        row for row in problem.rows if options.ratios is None or row.options.get("ratio", 0) in {0, *options.ratios}
    ]
    for row in rows[: options.rows]:
        theirs = [
            repeated(trainer, model, problem, row, seed, options.solve_steps or problem.steps)
            for seed in range(1, options.runs + 1)
        ]
        edit, seconds = timed(partial(trainer.unlearn, **problem.whole, **row.options))
        ours = _shares(model, problem.judged)
        edit.undo()
        cells: list[object] = [row.name, "{:.2f} / {:.2f} / {:.4f}".format(*row.notebook) if row.notebook else ""]
        for one, other in ((mean(x for x, _ in theirs), mean(x for _, x in theirs)), ours):
            cells.append(f"{100 * one:.2f} / {100 * other:.2f} / {problem.score(one, other):.4f}")
        found.append([*cells, f"{100 * (edit.gradient_share or 0):.0f}", f"{seconds:.0f}"])
        say(*found[-1])
    columns = " / ".join([*names, "F1"])
    print(
        table(
            [
                "setting",
                f"notebooks: {columns}",
                f"paper's protocol: {columns}",
                f"ours: {columns}",
                "gradient held (%)",
                "seconds",
            ],
            found,
        )
    )


if __name__ == "__main__":
    main()
