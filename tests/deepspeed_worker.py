"""The script of each process of ``tests/test_deepspeed.py``: trains a step with DeepSpeed, and saves a checkpoint.

Lightning's strategy needs a GPU. DeepSpeed itself does not, so this makes the calls that the strategy makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.conftest import Classifier, blobs

if __name__ == "__main__":
    import deepspeed  # not installed where these tests are collected

    folder, stage = sys.argv[1], int(sys.argv[2])
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    module = Classifier()
    parameters = list(module.parameters())
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(
        model=module, optimizer=torch.optim.Adam(parameters, 0.01), model_parameters=parameters, config=settings
    )[0]
    x, y = blobs()[:4]
    engine.backward(torch.nn.functional.cross_entropy(engine(x), y))
    engine.step()
    facts = {"pytorch-lightning_version": pl.__version__, "epoch": 0, "global_step": 1}
    engine.save_checkpoint(folder, client_state=facts, tag="checkpoint", exclude_frozen_parameters=False)
