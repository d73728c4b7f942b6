"""Compares an edit of your own model with baselines at the same cost, and with a retrained model.

    python benchmarks/compare.py --model my_package.Classifier --data my_package.Data --ckpt_path last.ckpt \\
        --forget_class 3 [--retrained retrained.ckpt] [--baselines "[ssd, salun]"] [--model.lr … --trainer.…]

Give the module and the datamodule as to LightningCLI, by import path. Without `--ckpt_path` the model is trained first.
The edit removes a class, or the training examples of `--forget "[17, 42]"`, by `trainer.unlearn` with its defaults.

Each run of a baseline may take as much processor time as the edit did. `tuned` is the best of a baseline's settings on
training-side data:

- for a class, by the harmonic mean of the accuracy on retained examples and the error rate on forget examples;
- for single examples, by how close their loss comes to the validation loss without raising the retained loss.

Losses are in the unit of the module's own loss. Accuracies need one cross-entropy for each example. Test data, if the
datamodule has any, is used in the report only. Prints a Markdown table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from baselines import BASELINES
from evidence import run_baselines, say, table, timed
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_gif import attach
from lightning_gif.data.examples import Examples
from lightning_gif.data.targets import class_targets
from lightning_gif.metrics import AccuracyGap, JensenShannonDivergence, PredictionAgreement
from lightning_gif.objective.objective import Objective

_MOST = 5000  # examples of each set that models are evaluated on


class _CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--ckpt_path", type=str, default=None, help="checkpoint of the trained model")
        parser.add_argument("--forget_class", type=int, default=None, help="the class to remove")
        parser.add_argument("--forget", type=list[int], default=None, help="dataset indices to remove instead")
        parser.add_argument("--retrained", type=str, default=None, help="checkpoint of a model trained without them")
        parser.add_argument(
            "--baselines", type=list[str], default=["all"], help=f"[all], or some of {', '.join(BASELINES)}"
        )


@dataclass
class _Known:
    """A model on a set of examples: losses ``(n,)``, and for classifiers logits ``(n, C)`` and labels ``(n,)``."""

    losses: Tensor
    logits: Tensor | None
    classes: Tensor | None

    @property
    def loss(self) -> float:
        return float(self.losses.double().mean())

    @property
    def accuracy(self) -> float:
        if self.logits is None or self.classes is None:
            return math.nan
        return float((self.logits.argmax(1) == self.classes).double().mean())


def main(args: list[str] | None = None) -> None:
    cli = _CLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=args,
        trainer_defaults={"logger": False, "enable_checkpointing": False},
    )
    trainer, model, data, options = cli.trainer, cli.model, cli.datamodule, cli.config
    if (options.forget is None) == (options.forget_class is None):
        raise SystemExit("Give either --forget_class or --forget: the class or the examples to remove.")
    if options.ckpt_path is None:
        trainer.fit(model, datamodule=data)
    else:
        model.load_state_dict(torch.load(options.ckpt_path, weights_only=True)["state_dict"])
    data.prepare_data()
    data.setup("fit")
    train = data.train_dataloader()
    attach(trainer, model, train_dataloaders=train)

    if options.forget is not None:
        gone = torch.zeros(len(train.dataset), dtype=torch.bool)
        gone[options.forget] = True
    else:
        gone = _of_class(train, options.forget_class)
    forget, retain = _part(train, gone), _part(train, ~gone)
    loaders = {"forget": forget, "retain": retain}
    for name, loader in _others(data).items():
        if options.forget_class is None:
            loaders[name] = loader
        else:
            of_class = _of_class(loader, options.forget_class)
            loaders[f"{name}, class"], loaders[f"{name}, others"] = _part(loader, of_class), _part(loader, ~of_class)
    say(f"{int(gone.sum())} of {len(gone)} training examples will be removed")

    def know(module: nn.Module) -> dict[str, _Known]:
        return {name: _ask(trainer, module, loader) for name, loader in loaders.items()}

    before = know(model)
    reference = None
    if options.retrained is not None:
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(torch.load(options.retrained, weights_only=True)["state_dict"])
        reference = know(model)
        model.load_state_dict(trained)

    def score(module: nn.Module) -> float:
        known = {
            name: _ask(trainer, module, loaders[name]) for name in ("forget", "retain", "validation") if name in loaders
        }
        if options.forget_class is not None and known["forget"].logits is not None:
            wrong, right = 1 - known["forget"].accuracy, known["retain"].accuracy
            return 2 * wrong * right / (wrong + right) if wrong + right else 0.0
        unseen = known.get("validation", before["retain"]).loss
        return -abs(known["forget"].loss - unseen) - max(known["retain"].loss - before["retain"].loss, 0.0)

    columns = ["", *(f"{name} {what}" for name in loaders for what in ("loss", "accuracy (%)"))]
    columns += ["gap to retraining (points)", "agreement (%)", "JSD", "seconds"]
    rows = [_row("before", before, reference, math.nan)]
    if reference is not None:
        rows.append(_row("retrained", reference, None, math.nan))
    edit, seconds = timed(partial(trainer.unlearn, forget))
    say(edit)
    rows.append(_row("edit", know(model), reference, seconds))
    edit.undo()
    for name, changed, spent in run_baselines(
        options.baselines, model, forget, retain, score, seconds=seconds, settings={}
    ):
        rows.append(_row(name, know(changed), reference, spent))
        say(name, f"{spent:.1f} s")
    print(table(columns, rows))


def _part(loader: DataLoader[Any], chosen: Tensor) -> DataLoader[Any]:
    """A loader of the chosen examples of a loader's dataset, in dataset order."""
    part = Subset(loader.dataset, chosen.nonzero().squeeze(1).tolist())
    return DataLoader(part, loader.batch_size or 64, collate_fn=loader.collate_fn)


def _of_class(loader: DataLoader[Any], label: int) -> Tensor:
    """A mask over the dataset of a loader: true for examples of a class."""
    everything = _part(loader, torch.ones(len(loader.dataset), dtype=torch.bool))
    found = [class_targets(batch) for batch in everything]
    if any(classes is None for classes in found):
        raise SystemExit(
            "--forget_class needs targets that are class labels. Use --forget with dataset indices instead."
        )
    return torch.cat(found) == label


def _others(data: pl.LightningDataModule) -> dict[str, DataLoader[Any]]:
    """The validation loader and the test loader, as far as the datamodule has them."""
    found = {}
    for stage, name, hook in (("validate", "validation", "val_dataloader"), ("test", "test", "test_dataloader")):
        if getattr(type(data), hook) is not getattr(pl.LightningDataModule, hook):
            data.setup(stage)
            loader = getattr(data, hook)()
            if isinstance(loader, DataLoader):
                found[name] = loader
    return found


def _ask(trainer: pl.Trainer, module: nn.Module, loader: DataLoader[Any]) -> _Known:
    with Objective.open(trainer, module) as objective:
        examples = Examples.from_loader(loader, objective.prepare, batch_size=256).sample(_MOST, 0)
        objective.learn_structure(examples)
        losses = objective.all_losses(examples)
        if objective.n_classes(examples) is None:
            return _Known(losses, None, None)
        with torch.no_grad():
            logits = torch.cat([objective.logits(objective.theta, batch) for batch in examples.batches()])
        classes = [batch.classes for batch in examples.batches()]
        return _Known(losses, logits, torch.cat(classes) if all(part is not None for part in classes) else None)


def _row(name: str, known: dict[str, _Known], reference: dict[str, _Known] | None, seconds: float) -> list[Any]:
    row: list[Any] = [name]
    for of in known.values():
        row += [f"{of.loss:.4g}", "" if math.isnan(of.accuracy) else f"{100 * of.accuracy:.2f}"]
    last = list(known)[-1]  # test data, or else the last set there is
    mine, other = known[last], None if reference is None else reference[last]
    if other is None or mine.logits is None or other.logits is None:
        row += ["", "", ""]
    else:
        gap = math.nan if mine.classes is None else float(AccuracyGap()(mine.logits, other.logits, mine.classes))
        row += [f"{gap:+.2f}", f"{100 * float(PredictionAgreement()(mine.logits, other.logits)):.2f}"]
        row += [f"{float(JensenShannonDivergence()(mine.logits, other.logits)):.4f}"]
    return [*row, "" if math.isnan(seconds) else f"{seconds:.1f}"]


if __name__ == "__main__":
    main()
