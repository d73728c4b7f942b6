"""Graph networks of PyTorch Geometric in a plain module, on batches of small graphs."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GAT, GCN, GIN, GraphSAGE, global_mean_pool

from . import Case, Items, fitted


def graphs(n: int = 32) -> Items:
    """Rings with three to seven nodes and noisy features. The mean of the features depends on the class."""
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(n):
        size, label = 3 + number % 5, number % 3
        ring = torch.arange(size)
        edges = torch.stack([torch.cat([ring, ring.roll(1)]), torch.cat([ring.roll(1), ring])])
        x = torch.randn(size, 4, generator=generator) + F.one_hot(torch.tensor(label), 4)
        found.append(Data(x=x, edge_index=edges, y=torch.tensor([label])))
    return Items(found)


class GraphClassifier(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(8, 3)

    def forward(self, data: Any) -> Tensor:
        return self.head(global_mean_pool(self.net(data.x, data.edge_index), data.batch))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch.y)
        self.log("loss", loss, batch_size=batch.num_graphs)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def train(kind: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    module = GraphClassifier(kind(4, 8, num_layers=2, out_channels=8, **options))
    return fitted(module, DataLoader(graphs(), 8, shuffle=True), callbacks)


CASES = [
    Case(
        f"{kind.__name__}, graph classification",
        partial(train, kind, options),
        lambda module, batch: module(batch),
        lambda z, batch: F.cross_entropy(z, batch.y),
    )
    for kind, options in ((GCN, {"dropout": 0.2}), (GIN, {"norm": "batch_norm"}), (GAT, {}), (GraphSAGE, {}))
]
