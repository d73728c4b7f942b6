"""What the report of an edit gives to loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_gif.unlearning.logged import FORGOTTEN_COLUMNS

from ..conftest import Classifier, fitted
from ..reports import images


@pytest.mark.slow
def test_an_edit_is_made_and_logged_even_if_few_examples_have_no_predicted_label(tmp_path: Path) -> None:
    class Mixed(Classifier):
        """One example has another loss, so that a sample of examples does not show it."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            rare = x.flatten(1)[:, 0] == 9
            out = self.net(x)
            return out.square().mean() if rare.any() and len(x) == 1 else F.cross_entropy(out, y)

    data = images(300)
    data.tensors[0][50, 0, 0, 0] = 9
    net = Mixed(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    trainer, _, _ = fitted(net, data, logger=CSVLogger(tmp_path))
    edit = trainer.unlearn([*range(100)], step="natural", batch_size=1)
    assert edit.context.forgotten[5] == [5, None, int(data.tensors[1][5]), None, None]
    assert [len(row) for row in edit.context.forgotten] == [len(FORGOTTEN_COLUMNS)] * 100
