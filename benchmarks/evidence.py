"""What the unlearning benchmarks share: retrained models as the truth, what is measured of a model beside them, tables.

A model is known by its logits on a few named sets of examples, so that retrained ones, which cost the most, are kept as
files in a cache folder and made once.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
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
"""Named sets of examples that models are asked about."""


@dataclass
class Known:
    """A model by what it answers.

    Attributes:
        logits: For each set of examples ``(n, C)``.
        seconds: To make the model, see :func:`timed`.
    """

    logits: dict[str, Tensor] = field(repr=False)
    seconds: float


def make_parser(description: str | None, steps: Sequence[str]) -> ArgumentParser:
    """A parser with the options that the benchmarks of unlearning have in common.

    Args:
        description: Of the benchmark.
        steps: The strategies of the edit that it asks for by default.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx files")
    parser.add_argument("--net", default="tinynet", choices=list(NETS))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3, help="retrained models of each kind")
    parser.add_argument("--cache", type=Path, help="folder where what is known of retrained models is kept")
    parser.add_argument("--steps", nargs="*", default=list(steps), help="strategies of the edit")
    parser.add_argument("--baselines", nargs="*", default=[], choices=["all", *BASELINES], help="their names, or all")
    return parser


def say(*parts: object) -> None:
    print(*parts, file=sys.stderr, flush=True)


def part(data: TensorDataset, chosen: Tensor, most: int | None = None, seed: int = 0) -> TensorDataset:
    """The examples that are chosen, a mask ``(n,)``; at random ``most`` of them."""
    positions = chosen.nonzero().squeeze(1)
    if most is not None and len(positions) > most:
        drawn = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))[:most]
        positions = positions[drawn.sort().values]
    return TensorDataset(*(tensor[positions] for tensor in data.tensors))


def know(model: nn.Module, sets: Sets, seconds: float) -> Known:
    return Known({name: answers(model, data) for name, data in sets.items()}, seconds)


def timed(make: Callable[[], Made]) -> tuple[Made, float]:
    """What is made, and the seconds that the processor took for it, whatever else it did in the meantime.

    With a GPU at work, of the clock.
    """
    starts = time.process_time(), time.perf_counter()
    made = make()
    seconds = time.process_time() - starts[0], time.perf_counter() - starts[1]
    return made, seconds[torch.cuda.is_initialized()]


def answers(model: nn.Module, data: TensorDataset) -> Tensor:
    """The logits ``(n, 10)``; a baseline may have made a model diverge, which then says the same of all classes."""
    return logits(model, data).nan_to_num(0.0)


def retrained(
    make: Callable[[int], nn.Module], sets: Sets, *, seeds: Sequence[int], cache: Path | None, name: str
) -> list[Known]:
    """Models that were trained without the examples in question, one for each seed.

    Args:
        make: From a seed to a trained model.
        sets: The examples that are asked about.
        seeds: Of the trainings.
        cache: Folder of the files that keep what is known of each.
        name: Start of their names, which must say what was trained on what and how.
    """
    found = []
    for seed in seeds:
        file = None if cache is None else cache / f"{name}_seed{seed}.pt"
        if file is not None and file.exists():
            stored = torch.load(file)
            known = Known({key: value.float() for key, value in stored["logits"].items()}, stored["seconds"])
            if known.logits.keys() != sets.keys() or any(len(known.logits[key]) != len(sets[key]) for key in sets):
                raise SystemExit(f"{file} is about other sets of examples than those asked about; remove it.")
        else:
            model, seconds = timed(partial(make, seed))
            known = know(model, sets, seconds)
            known.logits = {key: value.half().float() for key, value in known.logits.items()}  # as from the cache
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
    """Each baseline with the settings of its authors and with the best of its grid.

    Args:
        names: Of ``BASELINES``, or ``["all"]``.
        module: The trained model; it stays as it is.
        forget: See :func:`~baselines.tuned`.
        retain: See :func:`~baselines.tuned`.
        score: See :func:`~baselines.tuned`.
        seconds: Budget of each trial.
        settings: The best settings found so far, by name, which are used again; others are added.
        relabel: See :func:`~baselines.tuned`.

    Yields:
        The row's name, the changed model, and the seconds of that one run.
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
# What is measured
# --------------------------------------------------------------------------------------------------------------------


def accuracy(known: Known, sets: Sets, name: str) -> float:
    """In percent."""
    return 100 * float((known.logits[name].argmax(1) == sets[name].tensors[1]).double().mean())


def gap(known: Known, others: Sequence[Known], sets: Sets, name: str) -> float:
    """The accuracy less that of retrained models, in points, on average over these."""
    metric = AccuracyGap()
    return mean(float(metric(known.logits[name], other.logits[name], sets[name].tensors[1])) for other in others)


def divergence(known: Known, others: Sequence[Known], name: str) -> float:
    """The Jensen–Shannon divergence of the predictions from those of retrained models, in nats, on average."""
    metric = JensenShannonDivergence()
    return mean(float(metric(known.logits[name], other.logits[name])) for other in others)


def agreement(known: Known, others: Sequence[Known], name: str) -> float:
    """The share of equal predictions, in percent, on average over retrained models."""
    metric = PredictionAgreement()
    return 100 * mean(float(metric(known.logits[name], other.logits[name])) for other in others)


def membership(known: Known, sets: Sets, members: str, strangers: str) -> float:
    """How well a threshold on the loss tells the examples in question from test examples like them (AUROC)."""
    metric = MembershipInference()
    for name, member in ((members, True), (strangers, False)):
        targets = sets[name].tensors[1]
        metric.update(known.logits[name], targets, torch.full((len(targets),), member))
    return float(metric.compute())


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers with two digits after the point."""

    def cell(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
