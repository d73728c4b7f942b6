"""Measures how far the error bars of scores can be trusted: do they hold the mean score of other fits?

    python benchmarks/intervals.py --mnist path/to/MNIST/raw --fashion path/to/FashionMNIST/raw
        [--tasks digits cancer] [--fits 24] [--cache folder]

The tasks are those of `tasks.py`. Each network is trained with several seeds, and scored at its last state and at three
snapshots. The true score of an example is taken to be the mean over all other fits. All intervals are at 90 %.

- agreement: the intraclass correlation that reports print, of the states of a fit (mean over fits), and of the fits.
- snapshots: the share of scores whose interval from the four states of one fit holds the mean over the other fits.
- 3 fits: the same for the interval from three fits that are averaged over their states. `ends`: only the ten highest
  and the ten lowest scores of each query.
- right sign: the share of the scores with the sign of the mean over the other fits, for intervals of 3 fits that do not
  hold 0, and for those that do (which reports mark with `?`).

`--cache` keeps the scores. Prints a Markdown table; progress goes to stderr.
"""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from lds import say
from tasks import ASIDE, QUERIES, TASKS, Task, ours, scored
from torch import Tensor

from lightning_gif.attribution.uncertainty import LEVEL, agreement_of, t_quantile

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

TOGETHER, ENDS = 3, 10


def scores_of_states(task: Task, folders: dict[str, Path], seed: int) -> Tensor:
    """The scores at the last state of a fit and at its snapshots, ``(S, queries, n)``."""
    x, y = task.data(folders)
    of = scored(task, x[QUERIES:], y[QUERIES:], (x[:QUERIES], y[:QUERIES]), seed)
    parts = [ours("none")(of)]
    for state in of.kept["four"].chosen().values():
        of.module.load_state_dict(state)
        parts.append(ours("none")(of))
    return torch.stack(parts)


def interval(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the first axis, and half of its interval."""
    half = t_quantile(LEVEL, len(values) - 1) * values.std(0) / len(values) ** 0.5
    return values.mean(0), half


def agreement(values: Tensor) -> float:
    found = agreement_of(values.mean(0), values.std(0) / len(values) ** 0.5, len(values))
    assert found is not None
    return found


def ends(scores: Tensor) -> Tensor:
    """A mask of the highest and the lowest scores of each query."""
    order = scores.argsort(1)
    chosen = torch.cat([order[:, :ENDS], order[:, -ENDS:]], 1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def cells(fits: Tensor) -> list[str]:
    """The row of a task from the scores ``(fits, S, queries, n)``."""
    means, count = fits.mean(1), len(fits)
    found = [f"{sum(map(agreement, fits)) / count:.2f}", f"{agreement(means):.2f}" if count > 1 else "–"]
    if count < 2 * TOGETHER:
        return [*found, *["–"] * 6]
    held = []
    for number, states in enumerate(fits):
        mean, half = interval(states)
        others = means[torch.arange(count) != number].mean(0)
        held.append(((others - mean).abs() <= half).double().mean())
    found.append(f"{torch.stack(held).mean():.2f}")
    held, at_ends, marked, sure, unsure = [], [], [], [], []
    for start in range(0, count - TOGETHER + 1, TOGETHER):
        chosen = torch.arange(start, start + TOGETHER)
        mean, half = interval(means[chosen])
        rest = torch.ones(count, dtype=torch.bool)
        rest[chosen] = False
        others = means[rest].mean(0)
        holds, right, mark = (others - mean).abs() <= half, (others > 0) == (mean > 0), mean.abs() <= half
        held.append(holds.double().mean())
        at_ends.append(holds[ends(mean)].double().mean())
        marked.append(mark.double().mean())
        sure.append(right[~mark].double().mean())
        unsure.append(right[mark].double().mean())
    return found + [f"{torch.stack(values).mean():.2f}" for values in (held, at_ends, marked, sure, unsure)]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder with the four gzipped idx files of MNIST")
    parser.add_argument("--fashion", type=Path, help="the same of Fashion-MNIST")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, *ASIDE], default=[*TASKS, *ASIDE])
    parser.add_argument("--fits", type=int, default=24)
    parser.add_argument("--cache", type=Path, help="folder for the scores")
    options = parser.parse_args()
    digits.quiet()
    warnings.simplefilter("ignore")
    folders = {"mnist": options.mnist, "fashion": options.fashion}
    names = ["task", "fits", "agreement of states", "of fits", "snapshots", "3 fits", "ends", "marked `?`"]
    names += ["right sign", "right sign of marked"]
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for name in options.tasks:
        fits = []
        for seed in range(options.fits):
            path = None if options.cache is None else options.cache / f"{name}-{seed}.pt"
            if path is not None and path.exists():
                fits.append(torch.load(path))
                continue
            fits.append(scores_of_states({**TASKS, **ASIDE}[name], folders, seed))
            say(name, seed)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(fits[-1], path)
        print("| " + " | ".join([name, str(len(fits)), *cells(torch.stack(fits))]) + " |", flush=True)


if __name__ == "__main__":
    main()
