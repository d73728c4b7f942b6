"""Models of PyTorch Tabular, fitted by its class ``TabularModel``."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import pandas
import torch.nn.functional as F
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import (
    CategoryEmbeddingModelConfig,
    FTTransformerConfig,
    GANDALFConfig,
    NodeConfig,
)
from torch import Tensor

from . import Case


def table(n: int = 40) -> pandas.DataFrame:
    generator = numpy.random.default_rng(0)
    x, kind = generator.normal(size=(n, 3)), generator.integers(4, size=n)
    label = (x[:, 0] + kind > 1.5).astype(int)
    columns = {"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "kind": kind.astype(str)}
    return pandas.DataFrame({**columns, "label": label, "value": x[:, 1] + label})


def train(config: Any, target: str, callbacks: list[Any]) -> Any:
    model = TabularModel(
        data_config=DataConfig(target=[target], continuous_cols=["a", "b", "c"], categorical_cols=["kind"]),
        model_config=config,
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=8,
            max_epochs=2,
            accelerator="cpu",
            checkpoints=None,
            early_stopping=None,
            load_best=False,
            progress_bar="none",
            trainer_kwargs={"enable_model_summary": False},
        ),
        verbose=False,
        suppress_lightning_logger=True,
    )
    return model.fit(table(), validation=table(), callbacks=callbacks)


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "CategoryEmbedding": (CategoryEmbeddingModelConfig, {"layers": "8-8"}),
    "FTTransformer": (FTTransformerConfig, {"input_embed_dim": 8, "num_heads": 2, "num_attn_blocks": 1}),
    "GANDALF": (GANDALFConfig, {"gflu_stages": 2}),
    "NODE": (NodeConfig, {"num_trees": 4, "num_layers": 1, "depth": 2}),
}


def of_each(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch)["logits"], batch["target"].squeeze(1), reduction="none")


CASES = [
    Case(
        f"{name}, classification",
        partial(train, config(task="classification", **options), "label"),
        lambda module, batch: module(batch)["logits"],
        lambda z, batch: F.cross_entropy(z, batch["target"].squeeze(1)),
        influence_loss=of_each if name == "NODE" else None,
    )
    for name, (config, options) in MODELS.items()
]
CASES.append(
    Case(
        "CategoryEmbedding, regression",
        partial(train, CategoryEmbeddingModelConfig(task="regression", layers="8-8"), "value"),
        lambda module, batch: module(batch)["logits"],
        lambda z, batch: F.mse_loss(z, batch["target"]),
    )
)
