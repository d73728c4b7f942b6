"""Networks of pytorch-forecasting on the windows of its TimeSeriesDataSet."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import pandas
from pytorch_forecasting import (
    DecoderMLP,
    DeepAR,
    NBeats,
    RecurrentNetwork,
    TemporalFusionTransformer,
    TimeSeriesDataSet,
)
from pytorch_forecasting.metrics import MAE, RMSE, NormalDistributionLoss, QuantileLoss
from torch import Tensor

from . import Case, fitted

INPUT, OUTPUT = 8, 2


def windows(**options: Any) -> TimeSeriesDataSet:
    steps = numpy.arange(24)
    noise = numpy.random.default_rng(0).normal(size=(2, 24)) * 0.2
    rows = [
        {"step": step, "group": str(group), "value": numpy.sin(step / 3 + group) + noise[group, step]}
        for group in range(2)
        for step in steps
    ]
    table = pandas.DataFrame(rows)
    return TimeSeriesDataSet(
        table,
        time_idx="step",
        target="value",
        group_ids=["group"],
        max_encoder_length=INPUT,
        min_encoder_length=INPUT,
        max_prediction_length=OUTPUT,
        time_varying_unknown_reals=["value"],
        **options,
    )


def train(kind: Any, loss: Any, options: dict[str, Any], data: dict[str, Any], callbacks: list[Any]) -> Any:
    dataset = windows(**data)
    module = kind.from_dataset(dataset, loss=loss(), log_interval=-1, log_val_interval=-1, **options)
    return fitted(module, dataset.to_dataloader(train=True, batch_size=8), callbacks)


def rmse_of_each(module: Any, batch: Any) -> Tensor:
    x, (y, _) = batch
    return (module(x)["prediction"].squeeze(-1) - y).square().mean(1).sqrt()


KNOWN = {"time_varying_known_reals": ["step"]}
SMALL = {"widths": [8, 8], "backcast_loss_ratio": 0.0, "num_blocks": [1, 1], "num_block_layers": [1, 1]}
CASES = [
    Case("NBeats, MAE", partial(train, NBeats, MAE, SMALL, {})),
    Case("RecurrentNetwork, MAE", partial(train, RecurrentNetwork, MAE, {"hidden_size": 6}, KNOWN)),
    Case(
        "DecoderMLP, RMSE",
        partial(train, DecoderMLP, RMSE, {"hidden_size": 4, "n_hidden_layers": 1}, KNOWN),
        influence_loss=rmse_of_each,
    ),
    Case("DeepAR", partial(train, DeepAR, NormalDistributionLoss, {"hidden_size": 6}, KNOWN)),
    Case(
        "TemporalFusionTransformer, QuantileLoss",
        partial(train, TemporalFusionTransformer, QuantileLoss, {"hidden_size": 4, "attention_head_size": 1}, KNOWN),
    ),
]
