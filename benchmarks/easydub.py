"""Edits the precomputed models of EasyDUB, and compares them with its retrained models.

    python benchmarks/easydub.py --root path/to/EasyDUB-dataset --forget_set 2 --models 100

EasyDUB (arXiv 2602.16400) has 200 ResNet-9 that were trained on CIFAR-10, and for each of ten forget sets 200 that were
trained without it, with their margins. So an unlearning method can be judged without any training. The folder is that
of https://huggingface.co/datasets/easydub/EasyDUB-dataset, with the images of CIFAR-10 in `data/cifar-10-batches-py`:

    forget_sets/cifar10/forget_set_{set}.npy                                  indices of training examples
    models/cifar10/pretrain/resnet9/id_{model}_epoch_23.pt                    states of the trained models
    margins/cifar10/pretrain/{retain,val,forget_{set}}/resnet9/id_{model}_epoch_23.npy
    margins/cifar10/oracle/forget_{set}/{retain,val,forget}/resnet9/id_{model}_epoch_23.npy

Prints a Markdown table: the 95th percentile of KLOM on forget, retained and validation examples, before and after
`trainer.unlearn`. For forget set 2 and 100 models, the authors report 9.265, 0.319 and 0.264 before an edit.
`--models 100` takes minutes on a GPU. Without the folder of models, only what is before an edit is printed.
"""

from __future__ import annotations

import pickle
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from evidence import say, table, timed
from tasks import Module
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback, attach
from lightning_gif.metrics import KLOM, margins

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

PARTS = ("forget", "retain", "val")
MEAN, SPREAD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BATCH = 500


@dataclass(frozen=True)
class EasyDUB:
    """The folder of EasyDUB.

    Attributes:
        root: The folder.
        number: The number of the forget set.
    """

    root: Path
    number: int

    def forget(self) -> Tensor:
        """The indices of the forget examples."""
        return torch.from_numpy(np.load(self.root / f"forget_sets/cifar10/forget_set_{self.number}.npy")).long()

    def retrained(self, part: str, models: Sequence[int]) -> Tensor:
        """The margins ``(models, n)`` of models that were trained without the forget examples."""
        return self._margins(f"oracle/forget_{self.number}/{part}", models)

    def trained(self, part: str, models: Sequence[int]) -> Tensor:
        """The margins ``(models, n)`` of models that were trained on all examples, on the same examples."""
        if part == "forget":
            return self._margins(f"pretrain/forget_{self.number}", models)
        found = self._margins(f"pretrain/{part}", models)
        if part == "retain" and found.shape[1] > self.retrained(part, models[:1]).shape[1]:  # of all training examples
            return self.split(found, dim=1)["retain"]
        return found

    def split(self, values: Tensor, dim: int = 0) -> dict[str, Tensor]:
        """The values of all training examples as those of the forget and of the retained ones."""
        kept = torch.ones(values.shape[dim], dtype=torch.bool)
        kept[self.forget()] = False
        return {
            "forget": values.index_select(dim, self.forget()),
            "retain": values.index_select(dim, kept.nonzero().squeeze(1)),
        }

    def net(self, model: int) -> nn.Module:
        """A model that was trained on all examples."""
        file = self.root / f"models/cifar10/pretrain/resnet9/id_{model}_epoch_23.pt"
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = {key.removeprefix("model.").removeprefix("module."): value for key, value in state.items()}
        net = resnet9(state["0.0.weight"].shape[0])
        net.load_state_dict(state)
        return net

    def images(self) -> tuple[TensorDataset, TensorDataset]:
        """The training and the validation examples, standardised."""
        folder = self.root / "data/cifar-10-batches-py"
        return tuple(  # type: ignore[return-value]
            _images([folder / name for name in names])
            for names in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"])
        )

    def _margins(self, folder: str, models: Sequence[int]) -> Tensor:
        files = [self.root / f"margins/cifar10/{folder}/resnet9/id_{model}_epoch_23.npy" for model in models]
        return torch.from_numpy(np.stack([np.load(file) for file in files])).float()


def _images(files: Sequence[Path]) -> TensorDataset:
    parts = []
    for file in files:
        with file.open("rb") as opened:
            parts.append(pickle.load(opened, encoding="bytes"))  # the format of CIFAR-10
    x = torch.cat([torch.from_numpy(np.asarray(part[b"data"])) for part in parts]).view(-1, 3, 32, 32)
    y = torch.tensor([label for part in parts for label in part[b"labels"]])
    mean, spread = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, SPREAD))
    return TensorDataset((x / 255 - mean) / spread, y)


class Residual(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.2 * x


def resnet9(width: int = 64, classes: int = 10) -> nn.Module:
    """The network of EasyDUB, whose parameters have the same names. Its width there is 64."""

    def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    def residual(channels: int) -> nn.Module:
        return Residual(nn.Sequential(block(channels, channels), block(channels, channels)))

    one, two, four = width, 2 * width, 4 * width
    return nn.Sequential(
        *(block(3, one), block(one, two, 5, 2, 2), residual(two), block(two, four), nn.MaxPool2d(2), residual(four)),
        *(block(four, two, padding=0), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(two, classes, bias=False)),
        Scaled(),
    )


@torch.no_grad()
def margins_of(module: pl.LightningModule, data: TensorDataset) -> Tensor:
    """The margins ``(n,)`` of a model in evaluation mode."""
    module.eval()
    parts = DataLoader(data, BATCH)
    return torch.cat([margins(module(x.to(module.device)), y.to(module.device)).cpu() for x, y in parts])


def edited(data: EasyDUB, models: Sequence[int], options: dict[str, Any]) -> tuple[dict[str, Tensor], float]:
    """The margins ``(models, n)`` by part of the examples after an edit of each model, and the seconds of an edit."""
    (train, val), found, spent = data.images(), dict[str, list[Tensor]](), 0.0
    for model in models:
        module = Module(data.net(model))
        trainer = pl.Trainer(
            callbacks=[GIFCallback()], logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        attach(trainer, module, train_dataloaders=DataLoader(train, BATCH, shuffle=True))
        report, seconds = timed(lambda trainer=trainer: trainer.unlearn(data.forget().tolist(), **options))
        spent += seconds / len(models)
        for part, values in {**data.split(margins_of(module, train)), "val": margins_of(module, val)}.items():
            found.setdefault(part, []).append(values)
        say(f"model {model}: {report.verdict}")
    return {part: torch.stack(values) for part, values in found.items()}, spent


def klom(ours: Tensor, retrained: Tensor) -> float:
    """The 95th percentile of KLOM over examples."""
    return float(KLOM()(ours, retrained)["percentile_95"])


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder of EasyDUB")
    parser.add_argument("--forget_set", type=int, default=2)
    parser.add_argument("--models", type=int, default=100, help="the number of models of each kind")
    parser.add_argument("--damping", type=float, help="the damping of the edit, since the training was not recorded")
    options = parser.parse_args()
    digits.quiet()
    data, models = EasyDUB(options.root, options.forget_set), range(options.models)
    retrained = {part: data.retrained(part, models) for part in PARTS}
    rows = {"nothing": ({part: data.trained(part, models) for part in PARTS}, 0.0)}
    if (options.root / "models").exists():
        rows["unlearn, default"] = edited(data, models, {"damping": options.damping})
    else:
        say(f"{options.root} has no folder models, so nothing is edited")
    print(
        table(
            ["95th percentile of KLOM", *PARTS, "seconds of an edit"],
            [
                [name, *(klom(ours[part], retrained[part]) for part in PARTS), took]
                for name, (ours, took) in rows.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
