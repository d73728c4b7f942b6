"""A fit, scores, an edit and its undo: shows that an installed package works. It needs no file of this repository."""

import warnings

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


warnings.simplefilter("ignore")
data, gif, net = TensorDataset(torch.randn(24, 4), torch.arange(24) % 3), GIFCallback(), Net()
trainer = Trainer(callbacks=[gif], accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False)
trainer.fit(net, DataLoader(data, 8))
before = net.layer.weight.clone()
print(gif.influence(data[:2]))
edit = gif.unlearn([3])
assert not torch.equal(before, net.layer.weight)
edit.undo()
assert torch.equal(before, net.layer.weight)
