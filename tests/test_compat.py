"""Lightning under both of its names: each runs in a process of its own, since a process keeps its first import."""

from __future__ import annotations

import subprocess
import sys

import pytest

STORY = """
import tempfile
import pytorch_lightning as pl, torch, torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from lightning_gif import GIFCallback, attach
from lightning_gif.cli import main

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)
    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

torch.manual_seed(0)
data = TensorDataset(torch.randn(20, 3), torch.arange(20) % 2)
options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
gif = GIFCallback(ratio=1.0, solver="dense")
trainer = pl.Trainer(max_epochs=2, callbacks=[gif], **options)
model = Model()
trainer.fit(model, DataLoader(data, 5, shuffle=True))
batch = tuple(t[:2] for t in data.tensors)
assert torch.equal(trainer.influence(batch).scores, gif.influence(batch).scores)
before = model.net.weight.clone()
edit = trainer.unlearn(batch)
assert not torch.equal(before, model.net.weight)
edit.undo()
assert torch.equal(before, model.net.weight)
with tempfile.TemporaryDirectory() as folder:
    record, checkpoint = folder + "/record.jsonl", folder + "/a.ckpt"
    trainer.unlearn(batch, record=record)
    trainer.save_checkpoint(checkpoint)
    assert main(["verify", "--record", record, "--ckpt_path", checkpoint]) == 0
other = pl.Trainer(**options)
attach(other, model, train_dataloaders=DataLoader(data, 5), callback=GIFCallback(ratio=1.0))
assert other.influence(batch, solver="dense").scores.shape == (1, 20)
lone = pl.Trainer(**options)
attach(lone, model)
try:
    lone.influence(batch)
except ValueError as error:
    assert "There is no training data" in str(error), error
else:
    raise AssertionError("no training data, but no error")
"""


@pytest.mark.slow
@pytest.mark.parametrize("alone", [True, False], ids=["pytorch-lightning alone", "beside lightning"])
def test_the_package_works_with_pytorch_lightning(alone: bool) -> None:
    pytest.importorskip("pytorch_lightning", reason="the other package name is not installed")
    hide = "import sys; sys.modules['lightning'] = None\n" if alone else ""
    done = subprocess.run([sys.executable, "-c", hide + STORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
