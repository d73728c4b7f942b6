"""Influence reports to test with, and what is read from their pictures and logs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.text import Text
from torch import nn
from torch.utils.data import TensorDataset

from lightning_gif import InfluenceReport
from lightning_gif.parameters import Targets
from lightning_gif.solvers.solution import Solution, Status

from .conftest import Classifier, batch_of, fitted


def images(n: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.rand(n, 1, 8, 8, generator=generator), torch.arange(n) % 3)


def image_net() -> Classifier:
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))


def report_of(scores: Any, **changes: Any) -> InfluenceReport:
    """A report with given scores on a data set whose indices are not their positions."""
    scores = torch.as_tensor(scores, dtype=torch.float64)
    n = scores.shape[1]
    solution = Solution(
        x=torch.zeros(2),
        status=Status.CONVERGED,
        solver="lissa",
        iterations=2,
        hvps=6,
        examples=60,
        residual=1e-3,
        unexplained=0.1,
        sigma_max=1.0,
        rtol=1e-2,
        damping=0.0,
        seconds=0.1,
        peak_memory=None,
        residuals=[1.0, 0.1, 1e-3],
    )
    values: dict[str, Any] = {
        "scores": scores,
        "indices": 100 + torch.arange(n),
        "n_train": n,
        "solutions": [solution] * len(scores),
        "curvature": {"kind": "hessian"},
        "targets": Targets({"weight": torch.tensor([0, 1])}),
        "k": 10,
        "dataset": None,
        "queries": [],
        "settings": {"method": "gif"},
        "seconds": 1.0,
    }
    return InfluenceReport(**{**values, **changes})


def words(figure: Any) -> list[str]:
    """All texts of a figure: titles, labels of bars, notes."""
    figure.canvas.draw()
    found = (text.get_text() for text in figure.findobj(lambda one: isinstance(one, Text)))
    return [text for text in found if text]


def axes_of(figure: Any, title: str) -> Any:
    """The axes with a title."""
    (found,) = [axes for axes in figure.axes if axes.get_title() == title]
    return found


def bars_of(figure: Any, title: str) -> dict[str, float]:
    """The lengths of the horizontal bars of the axes with a title, by the name beside each of them."""
    axes = axes_of(figure, title)
    names = [label.get_text() for label in axes.get_yticklabels()]
    return dict(zip(names, [bar.get_width() for bar in axes.patches], strict=True))


def groups_of(axes: Any) -> dict[str, dict[str, float]]:
    """The lengths of grouped horizontal bars, by the name of the series and by the name beside the bars."""
    names = [label.get_text() for label in axes.get_yticklabels()]
    return {
        bars.get_label(): dict(zip(names, [bar.get_width() for bar in bars], strict=True)) for bars in axes.containers
    }


def titles(figure: Any) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def csv_values(logger: CSVLogger) -> dict[str, float]:
    with Path(logger.log_dir, "metrics.csv").open() as file:
        return {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}


def answer_on_images(**options: Any) -> tuple[InfluenceReport, TensorDataset]:
    trainer, _, dataset = fitted(image_net(), images())
    return trainer.influence(batch_of(dataset, [4, 7, 9]), k=3, eigenvalues=2, **options), dataset


def drawn(report: InfluenceReport, query: int = 0) -> list[Any]:
    """All that a plot shows."""
    axes = report.plot(query).axes
    pictures = [image.get_array().tolist() for axis in axes for image in axis.images]
    lines = [line.get_xydata().tolist() for axis in axes for line in axis.lines]
    bars = [patch.get_height() for axis in axes for patch in axis.patches]
    return [[axis.get_title() for axis in axes], [t.get_text() for a in axes for t in a.texts], pictures, lines, bars]
