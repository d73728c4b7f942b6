"""Models of neuralforecast, fitted by its class ``NeuralForecast``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import pandas
import torch
from neuralforecast import NeuralForecast
from neuralforecast.losses.pytorch import MSE
from neuralforecast.models import MLP, NHITS, NLinear
from pytorch_lightning import Callback
from torch import Tensor

from lightning_gif import attach

from . import Case, quiet

INPUT, OUTPUT = 8, 2


def table(groups: int = 16, n: int = 20) -> pandas.DataFrame:
    """Sixteen series. A batch of the package holds whole series; an example is one of them."""
    noise = numpy.random.default_rng(0).normal(size=(groups, n)) * 0.2
    days = pandas.date_range("2024-01-01", periods=n)
    rows = [
        {"unique_id": str(group), "ds": day, "y": numpy.sin(step / 3 + group) + noise[group, step]}
        for group in range(groups)
        for step, day in enumerate(days)
    ]
    return pandas.DataFrame(rows)


class Keeper(Callback):
    """Keeps the trainer, which the package removes from the module after the fit."""

    trainer: Any = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.trainer = trainer

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.loader = trainer.train_dataloader

    def attached(self, module: Any) -> Any:
        attach(self.trainer, module, train_dataloaders=self.loader)
        return self.trainer


def train(kind: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    trainer = quiet([*callbacks, Keeper()])
    del trainer["max_epochs"]
    model = kind(OUTPUT, input_size=INPUT, loss=MSE(), max_steps=8, batch_size=8, random_seed=0, **options, **trainer)
    forecast = NeuralForecast([model], freq="D")
    forecast.fit(table())
    (model,) = forecast.models  # a copy, with copies of the callbacks
    (keeper,) = (one for one in model.trainer_kwargs["callbacks"] if isinstance(one, Keeper))
    return keeper.attached(model)


def last_window(module: Any, batch: Any) -> Tensor:
    """The squared error of the last window of each series, instead of random windows."""
    y = batch["temporal"][:, int(batch["y_idx"])].to(next(module.parameters()).dtype)
    past, future = y[:, -INPUT - OUTPUT : -OUTPUT], y[:, -OUTPUT:]
    window = {"insample_y": past[..., None], "insample_mask": torch.ones_like(past), "futr_exog": None}
    predicted = module({**window, "hist_exog": None, "stat_exog": None})
    return (predicted.squeeze(-1) - future).square().mean(1)


CASES = [
    Case("NLinear", partial(train, NLinear, {}), influence_loss=last_window),
    Case("MLP", partial(train, MLP, {"hidden_size": 8, "num_layers": 1}), influence_loss=last_window),
    Case(
        "NHITS",
        partial(train, NHITS, {"mlp_units": [[8, 8], [8, 8], [8, 8]]}),
        influence_loss=last_window,
    ),
]
