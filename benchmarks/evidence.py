"""Code that the unlearning benchmarks share: retrained models as the ground truth, measurements and tables.

A model is represented by its logits on a few named sets of examples. Retraining costs the most, so the logits of
retrained models are kept as files in a cache folder.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from baselines import BASELINES, Baseline, tuned
from mnist import NETS, logits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif.metrics import AccuracyGap, JensenShannonDivergence, MembershipInference, PredictionAgreement

__all__ = [
    "Known",
    "Sets",
    "accuracy",
    "agreement",
    "answers",
    "divergence",
    "gap",
    "know",
    "make_parser",
    "membership",
    "part",
    "retrained",
    "run_baselines",
    "say",
    "table",
    "timed",
]

Made = TypeVar("Made")

Sets = Mapping[str, TensorDataset]
"""Named sets of examples that models are evaluated on."""


@dataclass
class Known:
    """A model, represented by its predictions.

    Attributes:
        logits: The logits ``(n, C)`` on each set of examples, by its name.
        seconds: The time that it took to make the model, see :func:`timed`.
    """

    logits: dict[str, Tensor] = field(repr=False)
    seconds: float


def make_parser(description: str | None, steps: Sequence[str]) -> ArgumentParser:
    """A parser with the options that all unlearning benchmarks have.

    Args:
        description: The description of the benchmark.
        steps: The default strategies of the edit.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four gzipped idx files")
    parser.add_argument("--net", default="tinynet", choices=list(NETS), help="the network")
    parser.add_argument("--epochs", type=int, default=10, help="training epochs of each model")
    parser.add_argument("--seeds", type=int, default=3, help="number of retrained models")
    parser.add_argument("--cache", type=Path, help="folder for the logits of retrained models")
    parser.add_argument("--steps", nargs="*", default=list(steps), help="strategies of the edit")
    parser.add_argument(
        "--baselines", nargs="*", default=[], choices=["all", *BASELINES], help="names of baselines, or all"
    )
    return parser


def say(*parts: object) -> None:
    print(*parts, file=sys.stderr, flush=True)


def part(data: TensorDataset, chosen: Tensor, most: int | None = None, seed: int = 0) -> TensorDataset:
    """The chosen examples, given as a mask ``(n,)``; if there are more than ``most``, a random sample of them."""
    positions = chosen.nonzero().squeeze(1)
    if most is not None and len(positions) > most:
        drawn = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:most]
        positions = positions[drawn.sort().values]
    return TensorDataset(*(tensor[positions] for tensor in data.tensors))


def know(model: nn.Module, sets: Sets, seconds: float) -> Known:
    return Known({name: answers(model, data) for name, data in sets.items()}, seconds)


def timed(make: Callable[[], Made]) -> tuple[Made, float]:
    """The result of a function, and its seconds of processor time. Once a GPU is in use, its seconds of wall time."""
    starts = time.process_time(), time.perf_counter()
    made = make()
    seconds = time.process_time() - starts[0], time.perf_counter() - starts[1]
    return made, seconds[torch.cuda.is_initialized()]


def answers(model: nn.Module, data: TensorDataset) -> Tensor:
    """The logits ``(n, 10)``. NaN, as in a model that a baseline made diverge, becomes 0: the same for all classes."""
    return logits(model, data).nan_to_num(0.0)


def retrained(
    make: Callable[[int], nn.Module], sets: Sets, *, seeds: Sequence[int], cache: Path | None, name: str
) -> list[Known]:
    """Models that were trained without the forget examples, one for each seed.

    Args:
        make: A function from a seed to a trained model.
        sets: The examples that the models are evaluated on.
        seeds: The seeds of the trainings.
        cache: The folder that keeps the logits of each model in a file.
        name: The start of the files' names. It must identify the network, its data and its training.

    Raises:
        SystemExit: A cached file is for other sets of examples.
    """
    found = []
    for seed in seeds:
        file = None if cache is None else cache / f"{name}_seed{seed}.pt"
        if file is not None and file.exists():
            stored = torch.load(file)
            known = Known({key: value.float() for key, value in stored["logits"].items()}, stored["seconds"])
            if known.logits.keys() != sets.keys() or any(len(known.logits[key]) != len(sets[key]) for key in sets):
                raise SystemExit(f"{file} was written for other sets of examples. Remove it.")
        else:
            model, seconds = timed(partial(make, seed))
            known = know(model, sets, seconds)
            known.logits = {key: value.half().float() for key, value in known.logits.items()}  # rounded as in the cache
            say(f"retrained {name}, seed {seed}: {known.seconds:.0f} s")
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                halves = {key: value.half() for key, value in known.logits.items()}
                torch.save({"logits": halves, "seconds": known.seconds}, file)
        found.append(known)
    return found


def run_baselines(
    names: Sequence[str],
    module: pl.LightningModule,
    forget: DataLoader[Any],
    retain: DataLoader[Any],
    score: Callable[[nn.Module], float],
    *,
    seconds: float,
    settings: dict[str, dict[str, Any]],
    relabel: Tensor | None = None,
) -> Iterator[tuple[str, nn.Module, float]]:
    """Runs each baseline with the settings of its authors, and with the best settings of its grid.

    Args:
        names: Names in ``BASELINES``, or ``["all"]``.
        module: The trained model. It is not changed.
        forget: See :func:`~baselines.tuned`.
        retain: See :func:`~baselines.tuned`.
        score: See :func:`~baselines.tuned`.
        seconds: The budget of each run, in processor time.
        settings: The best settings so far, by baseline. They are used again; those of other baselines are added.
        relabel: See :func:`~baselines.tuned`.

    Yields:
        The name of the row, the changed model, and the seconds of that run.
    """
    for name in BASELINES if list(names) == ["all"] else names:
        for how in ("default", "tuned"):
            baseline = BASELINES[name]
            if how == "default" or name in settings:
                only = baseline.published if how == "default" else settings[name]
                baseline = Baseline(baseline.function, only, [only])
            outcome = tuned(baseline, module, forget, retain, score, seed=0, seconds=seconds, relabel=relabel)
            if how == "tuned":
                settings[name] = outcome.chosen.hyperparameters
            yield f"{name}, {how}", outcome.module, outcome.chosen.seconds


# --------------------------------------------------------------------------------------------------------------------
# Measurements
# --------------------------------------------------------------------------------------------------------------------


def accuracy(known: Known, sets: Sets, name: str) -> float:
    """The accuracy on a set of examples, in percent."""
    return 100 * float((known.logits[name].argmax(1) == sets[name].tensors[1]).double().mean())


def gap(known: Known, others: Sequence[Known], sets: Sets, name: str) -> float:
    """The accuracy minus that of a retrained model, in points: the mean over retrained models."""
    metric = AccuracyGap()
    return mean(float(metric(known.logits[name], other.logits[name], sets[name].tensors[1])) for other in others)


def divergence(known: Known, others: Sequence[Known], name: str) -> float:
    """The Jensen–Shannon divergence from a retrained model's predictions, in nats: the mean over retrained models."""
    metric = JensenShannonDivergence()
    return mean(float(metric(known.logits[name], other.logits[name])) for other in others)


def agreement(known: Known, others: Sequence[Known], name: str) -> float:
    """The share of labels predicted as a retrained model does, in percent: the mean over retrained models."""
    metric = PredictionAgreement()
    return 100 * mean(float(metric(known.logits[name], other.logits[name])) for other in others)


def membership(known: Known, sets: Sets, members: str, strangers: str) -> float:
    """The membership AUROC: how well a threshold on the loss separates forget examples from unseen ones like them."""
    metric = MembershipInference()
    for name, member in ((members, True), (strangers, False)):
        targets = sets[name].tensors[1]
        metric.update(known.logits[name], targets, torch.full((len(targets),), member))
    return float(metric.compute())


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table. Floating-point numbers get two decimals."""

    def cell(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
