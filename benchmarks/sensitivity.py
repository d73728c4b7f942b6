"""Measures what the tuned numbers of an edit change: each is halved and doubled, one at a time, for each goal.

    python benchmarks/sensitivity.py --data path/to/MNIST/raw --nets mlp cnn
    python benchmarks/sensitivity.py --smallest

A network is trained on a part of the training images. For label correction, some of them have wrong labels. The edit is
evaluated on other training images; test images are not used. Without `--data` the images are scikit-learn's digits,
enlarged. `--smallest` varies a few numbers on a few digits, as a check that the script works.

Prints one Markdown table. The first rows of a goal have the values with the defaults. All other rows have differences
from these values:

- loss and accuracy (in points) on the evaluation images, without those of a removed class;
- memorization, see `Trial.memorization`;
- the number of solves;
- the share of draws in which any weight differs from the edit with the defaults.

Values are means over `--draws`.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from mnist import NETS, fit, load, logits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, GIFWarning, UnlearnReport
from lightning_gif.unlearning import GOALS, Tuning

_FORGOTTEN_CLASSES = (3, 8, 5, 1)


@dataclass(frozen=True)
class Problem:
    """An edit of a trained network.

    Attributes:
        trainer: The trainer of the network.
        model: The network.
        forget: The dataset indices of the forget examples.
        options: Further arguments of `trainer.unlearn`.
        judged: The images that the edited network is evaluated on.
    """

    trainer: pl.Trainer
    model: Any
    forget: list[int]
    options: dict[str, Any]
    judged: TensorDataset


@dataclass(frozen=True)
class Variation:
    """One tuned number with another value.

    Attributes:
        part: The field of `Tuning`, or ``"goal"``.
        name: The name of the number.
        value: The value.
        factor: The factor to the default: 0.5 or 2, before the value is limited to its range.
    """

    part: str
    name: str
    value: float
    factor: float

    def tuning(self, goal: str) -> Tuning:
        if self.part == "goal":
            return Tuning(goals=(GOALS[goal](**{self.name: self.value}),))
        default = Tuning()
        return replace(default, **{self.part: replace(getattr(default, self.part), **{self.name: self.value})})


def digits() -> TensorDataset:
    """Scikit-learn's digits in the format of MNIST: ``(n, 1, 28, 28)`` in [0, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return TensorDataset(
        F.interpolate(images, (28, 28), mode="bilinear")[order], torch.tensor(data.target).long()[order]
    )


def part(data: TensorDataset, start: int, stop: int) -> TensorDataset:
    return TensorDataset(*(tensor[start:stop] for tensor in data.tensors))


def problems(options: Namespace, net: str) -> Iterator[tuple[str, list[Problem]]]:
    """The name of each goal, and its problems, one for each draw."""
    data = load(options.data)[0] if options.data else digits()
    n = options.examples
    train, unseen, judged = part(data, 0, n), part(data, n, n + n // 2), part(data, n + n // 2, 2 * n)
    labels = train.tensors[1]

    def fitted(targets: Tensor, seed: int) -> tuple[pl.Trainer, Any]:
        dataset = TensorDataset(train.tensors[0], targets)
        return fit(dataset, [GIFCallback(unconverged="ignore")], epochs=options.epochs, net=net, seed=seed)

    def drawn(seed: int) -> list[int]:
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 15].sort().values.tolist()

    seeds = range(options.draws)
    clean = [fitted(labels, seed) for seed in seeds]
    if "class" in options.goals:
        classes = [_FORGOTTEN_CLASSES[seed % len(_FORGOTTEN_CLASSES)] for seed in seeds]
        yield (
            "class",
            [
                Problem(*clean[seed], (labels == label).nonzero().squeeze(1).tolist(), {}, without(judged, label))
                for seed, label in zip(seeds, classes, strict=True)
            ],
        )
    if "examples" in options.goals:
        with_unseen = {"unseen": DataLoader(unseen, 256)}
        yield "examples", [Problem(*clean[seed], drawn(seed), with_unseen, judged) for seed in seeds]
    if "labels" in options.goals:
        found = []
        for seed in seeds:
            forget = drawn(seed)
            wrong = labels.clone()
            wrong[forget] = (labels[forget] + 1) % 10
            found.append(Problem(*fitted(wrong, seed), forget, {"relabel": labels[forget]}, judged))
        yield "labels", found


def without(data: TensorDataset, label: int) -> TensorDataset:
    kept = data.tensors[1] != label
    return TensorDataset(*(tensor[kept] for tensor in data.tensors))


def variations(goal: str) -> Iterator[Variation]:
    """Each tuned number of an edit with this goal, halved and doubled as far as its range allows."""
    default = Tuning()
    groups = {"goal": GOALS[goal](), **{entry.name: getattr(default, entry.name) for entry in fields(Tuning)[1:]}}
    for name, group in groups.items():
        for entry in fields(group):
            value = getattr(group, entry.name)
            for factor in (0.5, 2.0):
                changed = within(entry, value * factor)
                if changed != value:
                    yield Variation(name, entry.name, changed, factor)


def within(entry: Field[Any], value: float) -> float:
    """The nearest value in the range of a field."""
    assert entry.default is not MISSING
    value = min(max(value, entry.metadata["low"]), entry.metadata["high"])
    if not isinstance(entry.default, int):
        return value
    return max(math.ceil(value), int(entry.metadata["low"]) + entry.metadata["open_low"])


def outcome(problem: Problem, step: str, tuning: Tuning) -> tuple[float, float, float, int, str]:
    """Loss and accuracy (%) on the evaluation images, memorization, number of solves, and the digest of the weights."""
    report: UnlearnReport = problem.trainer.unlearn(problem.forget, step=step, tuning=tuning, **problem.options)
    predicted, labels = logits(problem.model, problem.judged), problem.judged.tensors[1]
    report.undo()
    right = 100 * float((predicted.argmax(1) == labels).double().mean())
    return (
        float(F.cross_entropy(predicted, labels)),
        right,
        report.memorization[1],
        len(report.solves),
        report.edit.digest,
    )


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def compare(net: str, goal: str, found: list[Problem], options: Namespace) -> None:
    """The rows of one goal and one network."""
    defaults: dict[str, list[tuple[float, float, float, int, str]]] = {}
    for step in ("relinearise", "search"):
        defaults[step] = [outcome(problem, step, Tuning()) for problem in found]
        loss, right, left, solves = (mean(values) for values in list(zip(*defaults[step], strict=True))[:4])
        row(f"`{step}`", "defaults", goal, net, f"{loss:.4f}", f"{right:.2f}", f"{left:.3f}", f"{solves:.1f}", "")
    for variation in list(variations(goal))[:: options.every]:
        # "search" is the only strategy that runs a line search for every goal.
        step = "search" if variation.part == "line_search" else "relinearise"
        start = time.perf_counter()
        results = [outcome(problem, step, variation.tuning(goal)) for problem in found]
        pairs = list(zip(results, defaults[step], strict=True))
        loss, right, left, solves = (mean(new[i] - old[i] for new, old in pairs) for i in range(4))
        other = mean(float(new[4] != old[4]) for new, old in pairs)
        name = f"`{variation.part}.{variation.name}`"
        cells = (f"{loss:+.4f}", f"{right:+.2f}", f"{left:+.3f}", f"{solves:+.1f}", f"{other:.2f}")
        row(name, f"{variation.value:g}", goal, net, *cells)
        print(f"{net}, {goal}, {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the four gzipped idx files")
    parser.add_argument("--nets", nargs="+", default=["mlp", "cnn"], choices=list(NETS), help="the networks")
    parser.add_argument(
        "--goals", nargs="+", default=["class", "examples", "labels"], choices=list(GOALS), help="the goals"
    )
    parser.add_argument("--examples", type=int, default=3000, help="training images; as many more are held out")
    parser.add_argument("--epochs", type=int, default=15, help="training epochs")
    parser.add_argument("--draws", type=int, default=2, help="trained networks, each with its draw of forget examples")
    parser.add_argument("--every", type=int, default=1, help="compute only every n-th row")
    parser.add_argument("--smallest", action="store_true", help="a check that takes seconds")
    options = parser.parse_args()
    if options.smallest:
        options.nets, options.examples, options.epochs, options.draws, options.every = ["mlp"], 400, 5, 1, 20
    elif not options.data:
        options.examples = min(options.examples, 898)  # half of the digits
    warnings.simplefilter("ignore", GIFWarning)
    row("number", "value", "goal", "network", "loss", "accuracy (%)", "memorization", "solves", "weights changed")
    row(*["---"] * 9)
    for net in options.nets:
        for goal, found in problems(options, net):
            compare(net, goal, found, options)


if __name__ == "__main__":
    main()
