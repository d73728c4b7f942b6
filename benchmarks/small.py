"""Measures the cost of training a perceptron, the fixed cost of a call, and the cost of self-influence of few examples.

    python benchmarks/small.py [--what training --what calls --what self-influence --what workers --what texts]
        [--net vit] [--rounds 5]

- training: five epochs of a perceptron with 2410 parameters on 1300 digits, without a callback, with an empty one and
  with :class:`GIFCallback`, with and without its logged values.
- calls: ``influence``, ``self_influence`` and ``unlearn`` on 64 digits and a perceptron with 1210 parameters. Most of
  the time goes into function calls, not arithmetic. The probe is :meth:`Objective.learn_structure`.
- self-influence: ``self_influence`` with a sketch, of 64 images of 64 × 64 pixels and a network of
  about 0.3 million parameters (convolutions or a transformer), with and without the Jacobians of single examples.
- workers: calls on 600 items that take two milliseconds each to read, with two workers that are kept between passes
  (``persistent_workers=True``), or started for each pass, and without workers. These times are wall time.
- texts: ``influence`` and ``self_influence`` with BERT and GPT2 of the package transformers, small and random, on 96
  padded texts, with losses from ``training_step`` and from ``influence_loss``. Without transformers it is left out.

Times are CPU seconds on one thread, medians over rounds in which the variants take turns. Prints Markdown tables.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import GIFCallback
from lightning_gif.curvature import by_solver
from lightning_gif.objective.objective import Objective


class Classifier(pl.LightningModule):
    """A classifier without any code for this package."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


class Patches(nn.Module):
    """A small vision transformer."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        layer = nn.TransformerEncoderLayer(width, 4, 3 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x).flatten(2).mT + self.position).mean(1))


def convolutions() -> nn.Module:
    sizes = [3, 32, 64, 128, 160]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))


NETS: dict[str, Callable[[], nn.Module]] = {"vit": Patches, "convolutions": convolutions}


def fitted(
    net: nn.Module,
    data: TensorDataset,
    callbacks: list[pl.Callback] | None = None,
    batch_size: int = 32,
    max_epochs: int = 1,
) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GIFCallback()] if callbacks is None else callbacks,
    )
    trainer.fit(Classifier(net), DataLoader(data, batch_size, shuffle=True))
    return trainer


def digits(n: int) -> TensorDataset:
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:n], dtype=torch.float32) / 16, torch.tensor(y[:n]))


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def training(rounds: int) -> None:
    data = digits(1300)
    kinds: dict[str, Callable[[], list[pl.Callback]]] = {
        "none": list,
        "an empty one": lambda: [pl.Callback()],
        "`GIFCallback(log_reports=False)`": lambda: [GIFCallback(log_reports=False)],
        "`GIFCallback()`": lambda: [GIFCallback()],
    }
    print("| callback | batch size | CPU time of five epochs (s) | ratio |\n| --- | --- | --- | --- |")
    for batch_size in (32, 64):
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(rounds + 1):
            for kind, made in kinds.items():
                torch.manual_seed(0)
                net, callbacks = perceptron(32), made()
                spent = seconds(partial(fitted, net, data, callbacks, batch_size, 5))
                if turn:  # the first round warms up
                    times[kind].append(spent)
        for kind, values in times.items():
            ratio = statistics.median(one / plain for one, plain in zip(values, times["none"], strict=True))
            print(f"| {kind} | {batch_size} | {statistics.median(values):.3f} | {ratio:.2f} |", flush=True)


def calls(rounds: int) -> None:
    data = digits(64)
    torch.manual_seed(0)
    trainer = fitted(perceptron(16), data)
    query = data[:8]
    probes: list[float] = []
    learn = Objective.learn_structure

    def timed(*args: Any) -> Any:
        start = time.process_time()
        try:
            return learn(*args)
        finally:
            probes.append(time.process_time() - start)

    Objective.learn_structure = timed  # type: ignore[method-assign]
    kinds: dict[str, Callable[[], Any]] = {
        "influence": lambda: trainer.influence(query),
        "self_influence": trainer.self_influence,
        "unlearn": lambda: trainer.unlearn([1, 2], dry_run=True),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds + 1):
        for kind, call in kinds.items():
            spent = seconds(call)
            if turn:  # the first round warms up
                times[kind].append(spent)
    Objective.learn_structure = learn  # type: ignore[method-assign]
    print("| call | CPU time (ms) | of which the probe (ms) |\n| --- | --- | --- |")
    probe = 1e3 * statistics.median(probes[len(kinds) :])
    for kind, values in times.items():
        print(f"| `{kind}` | {1e3 * statistics.median(values):.1f} | {probe:.1f} |")


def self_influence(nets: list[str], rounds: int) -> None:
    print("| network | parameters | one epoch of training (s) | with Jacobians (s) | with products (s) | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    most = by_solver._JACOBIAN_BYTES
    data = TensorDataset(torch.randn(64, 3, 64, 64), torch.arange(64) % 10)
    for name in nets:
        torch.manual_seed(0)
        net = NETS[name]()
        trainer = fitted(net, data)
        epoch = min(seconds(partial(fitted, net, data)) for _ in range(2))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for values, limit in zip(times, (most, 0), strict=True):
                by_solver._JACOBIAN_BYTES = limit
                values.append(seconds(partial(trainer.self_influence, solver="cg")))
        by_solver._JACOBIAN_BYTES = most
        new, old = (statistics.median(values) for values in times)
        size = sum(parameter.numel() for parameter in net.parameters())
        print(f"| {name} | {size} | {epoch:.2f} | {new:.1f} | {old:.1f} | {new / old:.2f} |", flush=True)


class Slow(TensorDataset):
    """Digits that take two milliseconds to read, as decoding a picture does."""

    def __getitem__(self, index: int) -> Any:
        time.sleep(0.002)
        return super().__getitem__(index)


def workers(rounds: int) -> None:
    data = Slow(*digits(600).tensors)
    torch.manual_seed(0)
    trainer = fitted(perceptron(16), TensorDataset(*data.tensors))
    query = data[:8]
    loaders = {
        "kept": DataLoader(data, 32, num_workers=2, persistent_workers=True),
        "started for each pass": DataLoader(data, 32, num_workers=2),
        "none": DataLoader(data, 32),
    }
    made: dict[str, Callable[..., Any]] = {
        "influence": partial(trainer.influence, query),
        "self_influence": trainer.self_influence,
        "unlearn": partial(trainer.unlearn, [1, 2], dry_run=True),
    }
    print("| call | workers | time (s) |\n| --- | --- | --- |")
    for name, call in made.items():
        times: dict[str, list[float]] = {kind: [] for kind in loaders}
        for _ in range(rounds):
            for kind, loader in loaders.items():
                start = time.perf_counter()
                call(dataloader=loader, batch_size=64)
                times[kind].append(time.perf_counter() - start)
        for kind, values in times.items():
            print(f"| `{name}` | {kind} | {statistics.median(values):.2f} |", flush=True)


class Texts(pl.LightningModule):
    """A language model of transformers on batches of token ids, their mask, and labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def losses(module: Any, batch: Any) -> Tensor:
    """The loss of each text: of its class, or the mean over its tokens."""
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    labels = labels[:, 1:]
    each = F.cross_entropy(logits[:, :-1].mT, labels, ignore_index=-100, reduction="none")
    return each.sum(1) / (labels != -100).sum(1)


def texts(rounds: int) -> None:
    try:
        from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
    except ModuleNotFoundError:
        print("transformers is not installed.")
        return
    bert = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    gpt2 = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (96, 12), generator=generator)
    mask = torch.arange(12) < torch.randint(4, 13, (96, 1), generator=generator)
    ids = ids * mask
    both = {"input_ids": ids, "attention_mask": mask.long()}
    data = {
        "BERT": (BertForSequenceClassification(bert), {**both, "labels": ids[:, 0] % 2}),
        "GPT2": (GPT2LMHeadModel(gpt2), {**both, "labels": ids.where(mask, -100)}),
    }
    print("| model | call | `training_step` (s) | `influence_loss` (s) | ratio |\n| --- | --- | --- | --- | --- |")
    for name, (model, columns) in data.items():
        items = [{key: column[i] for key, column in columns.items()} for i in range(96)]
        loader = DataLoader(items, 16)  # type: ignore[arg-type]
        trainers = []
        for given in (None, losses):
            torch.manual_seed(0)
            callback = GIFCallback(influence_loss=given, unconverged="ignore")
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainers.append(
                pl.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=[callback], **quiet)
            )
            trainers[-1].fit(Texts(model), loader)
        query = {key: column[:4] for key, column in columns.items()}
        for call in ("influence", "self_influence"):
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(rounds + 1):
                for trainer, values in zip(trainers, times, strict=True):
                    arguments = (query,) if call == "influence" else ()
                    spent = seconds(partial(getattr(trainer, call), *arguments))
                    if turn:  # the first round warms up
                        values.append(spent)
            step, own = map(statistics.median, times)
            print(f"| {name} | `{call}` | {step:.2f} | {own:.2f} | {step / own:.2f} |", flush=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--what",
        choices=["training", "calls", "self-influence", "workers", "texts"],
        action="append",
        help="by default all; may be repeated",
    )
    parser.add_argument("--net", choices=list(NETS), action="append", help="for self-influence; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    what = options.what or ["training", "calls", "self-influence", "workers", "texts"]
    if "training" in what:
        training(options.rounds)
    if "calls" in what:
        calls(options.rounds)
    if "self-influence" in what:
        self_influence(options.net or list(NETS), options.rounds)
    if "workers" in what:
        workers(options.rounds)
    if "texts" in what:
        texts(options.rounds)


if __name__ == "__main__":
    main()
