"""The way round for DeepSpeed: a checkpoint is made a single file, and attached on one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_gif import CheckpointError, attach
from lightning_gif.storage.checkpoints import read_checkpoint

from .conftest import Classifier, batch_of, blobs, loader, make_trainer

WORKER = Path(__file__).with_name("deepspeed_worker.py")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_deepspeed_is_made_a_single_file_and_attached(stage: int, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

    folder, file = tmp_path / "checkpoint", tmp_path / "whole.ckpt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(WORKER)]
    # DeepSpeed calls programs of its environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([*command, str(folder), str(stage)], check=True, env={**os.environ, "PATH": path})
    with pytest.raises(CheckpointError, match="convert_zero_checkpoint_to_fp32_state_dict"):
        read_checkpoint(folder)
    convert_zero_checkpoint_to_fp32_state_dict(folder, file)
    module = Classifier.load_from_checkpoint(file)
    torch.manual_seed(0)
    assert not torch.equal(module.net[0].weight, Classifier().net[0].weight)
    trainer, data = make_trainer(devices=1), blobs()
    attach(trainer, module, train_dataloaders=loader(data))
    report = trainer.influence(batch_of(data, slice(3)))
    assert report.scores.isfinite().all()
    assert report.scores.abs().sum() > 0
