"""Forecasting models of darts, fitted by their own `fit` on one series."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import torch.nn.functional as F
from darts import TimeSeries
from darts.models import BlockRNNModel, NBEATSModel, NLinearModel, TCNModel, TFTModel, TransformerModel, TSMixerModel
from darts.utils.likelihood_models.torch import GaussianLikelihood
from torch import Tensor

from . import Case, quiet

INPUT, OUTPUT = 8, 2


def series(n: int = 41) -> TimeSeries:
    steps = numpy.arange(n)
    noise = numpy.random.default_rng(0).normal(size=n) * 0.2
    return TimeSeries.from_values((numpy.sin(steps / 3) + noise).astype(numpy.float32))


def train(kind: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    trainer = quiet(callbacks)
    del trainer["max_epochs"]
    model = kind(INPUT, OUTPUT, batch_size=8, n_epochs=2, random_state=0, pl_trainer_kwargs=trainer, **options)
    model.fit(series())
    return model.trainer


def prediction(module: Any, batch: Any) -> Tensor:
    return module(batch.to_module_input()).prediction.squeeze(-1)


def squared(z: Tensor, batch: Any) -> Tensor:
    return F.mse_loss(z, batch.future_target)


MODELS: dict[Any, dict[str, Any]] = {
    NLinearModel: {},
    NBEATSModel: {"num_stacks": 2, "num_blocks": 1, "num_layers": 1, "layer_widths": 8, "expansion_coefficient_dim": 2},
    BlockRNNModel: {"model": "LSTM", "hidden_dim": 8},
    TCNModel: {"kernel_size": 3, "num_filters": 4},
    TransformerModel: {
        **{"d_model": 8, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 8}
    },
    TSMixerModel: {"hidden_size": 8, "ff_size": 8, "num_blocks": 1},
}

CASES = [Case(kind.__name__, partial(train, kind, options), prediction, squared) for kind, options in MODELS.items()]
CASES += [
    Case(
        "NLinearModel, GaussianLikelihood",
        partial(train, NLinearModel, {"likelihood": GaussianLikelihood(), "normalize": False}),
    ),
    Case(
        "TFTModel, QuantileRegression",
        partial(train, TFTModel, {"hidden_size": 4, "num_attention_heads": 2, "add_relative_index": True}),
    ),
]
