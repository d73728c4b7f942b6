"""What newcomers give at first: it is accepted, or the message has a remedy, which works."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import (
    BatchError,
    ConfigurationError,
    EditError,
    NonFiniteError,
    TrainingDataError,
    UnlearnReport,
    attach,
)

from .conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from .doubles import quick

EDIT: dict[str, Any] = {"step": "natural", "dry_run": True}


# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [torch.as_tensor, lambda mask: mask.numpy(), lambda mask: mask.tolist()])
def test_a_mask_is_as_good_as_indices(form: Any) -> None:
    trainer, _, data = fitted(callback=quick())
    mask = torch.zeros(48, dtype=torch.bool)
    mask[[4, 17, 40]] = True
    one, other = (trainer.unlearn(given, **EDIT) for given in (form(mask), [4, 17, 40]))
    assert one.n_forget == 3
    assert all(torch.equal(one.edit.new[name], other.edit.new[name]) for name in other.edit.new)
    report = trainer.influence(batch_of(data, slice(2)), among=form(mask))
    assert report.indices.tolist() == [4, 17, 40]
    assert trainer.self_influence(among=form(mask)).indices.tolist() == [4, 17, 40]


def test_a_mask_refers_to_the_dataset_also_if_training_uses_a_part_of_it() -> None:
    trainer, _, data = fitted(callback=quick(), limit_train_batches=2)
    used = trainer.influence(batch_of(data, slice(2))).indices
    mask = torch.zeros(48, dtype=torch.bool)
    mask[used[3]] = True
    assert trainer.influence(batch_of(data, slice(2)), among=mask).indices.tolist() == [int(used[3])]


@pytest.mark.parametrize(("mask", "told"), [([True, False], "has 2 values"), ([False] * 48, "is true for none")])
def test_a_mask_that_cannot_be_meant_is_refused(mask: list[bool], told: str) -> None:
    trainer, _, data = fitted(callback=quick())
    expected = rf"each of the 48 examples of the training dataset.*{told}.*\[17, 4031\]"
    with pytest.raises(BatchError, match=expected):
        trainer.unlearn(mask, **EDIT)
    with pytest.raises(BatchError, match=expected):
        trainer.influence(batch_of(data, slice(2)), among=mask)
    assert trainer.unlearn([17], **EDIT).n_forget == 1  # the remedy


# --------------------------------------------------------------------------------------------------------------------
# Classes and single items
# --------------------------------------------------------------------------------------------------------------------


def test_the_name_of_a_class_is_refused_with_the_function_that_selects_the_class() -> None:
    trainer, _, data = fitted(callback=quick())
    with pytest.raises(BatchError, match=r"got str.*For a class.*lambda batch: batch\[1\] == 3"):
        trainer.unlearn("cat", **EDIT)
    with pytest.raises(ConfigurationError, match=r"lambda batch: batch\[1\] == 3 for the label 3; got str"):
        trainer.influence(batch_of(data, slice(2)), among="cat")
    assert trainer.unlearn(lambda batch: batch[1] == 1, **EDIT).n_forget == int((data.tensors[1] == 1).sum())


def test_a_function_that_selects_nothing_is_answered_with_the_labels_that_there_are() -> None:
    trainer, _, data = fitted(callback=quick())
    labels = ", ".join(map(str, data.tensors[1].unique().tolist()))
    with pytest.raises(TrainingDataError, match=rf"none of the 48 .* Their labels are {labels}\. .*where the label"):
        trainer.unlearn(lambda batch: batch[1] == 9, **EDIT)


def test_a_single_item_is_refused_and_the_loader_over_it_works() -> None:
    trainer, _, data = fitted(callback=quick())
    with pytest.raises(BatchError, match=r"A batch of 5 .*single items.*DataLoader\(Subset\(dataset"):
        trainer.influence(data[3])
    by_loader = trainer.influence(DataLoader(Subset(data, [3]), 64))
    assert torch.equal(by_loader.scores, trainer.influence(batch_of(data, slice(3, 4))).scores)


# --------------------------------------------------------------------------------------------------------------------
# Datasets
# --------------------------------------------------------------------------------------------------------------------


def test_a_dataset_is_as_good_as_a_loader_over_it() -> None:
    trainer, _, data = fitted(callback=quick())
    some, rest = Subset(data, range(24)), Subset(data, range(24, 48))
    by_dataset, by_loader = (trainer.influence(given, per_example=True) for given in (some, DataLoader(some, 2)))
    assert torch.equal(by_dataset.scores, by_loader.scores)
    unseen = blobs(30, seed=5)
    one = trainer.unlearn(some, retain=rest, unseen=unseen, **EDIT)
    other = trainer.unlearn(range(24), unseen=DataLoader(unseen, 8), **EDIT)
    for report in (one, other):
        assert (report.n_forget, report.n_retain, report.n_unseen) == (24, 24, 30)
    assert all(torch.equal(one.edit.new[name], other.edit.new[name]) for name in other.edit.new)


def test_a_dataset_is_collated_as_in_training() -> None:
    def collate(items: list[Any]) -> Any:
        return torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])

    class Ragged(torch.utils.data.Dataset[Any]):
        """Items whose third part cannot be collated by default."""

        def __len__(self) -> int:
            return 48

        def __getitem__(self, index: int) -> Any:
            x, y = blobs()[index]
            return _Pair(x, y)

    trainer = make_trainer()
    attach(trainer, Classifier(), train_dataloaders=DataLoader(Ragged(), 8, collate_fn=collate), callback=quick())
    assert trainer.influence(Subset(Ragged(), [1, 2])).scores.shape == (1, 48)


class _Pair:
    """Unpacks into an input and a target, but is no tuple that a default collate function knows."""

    def __init__(self, *parts: torch.Tensor) -> None:
        self.parts = parts

    def __iter__(self) -> Any:
        return iter(self.parts)


def test_a_list_of_images_where_a_loader_is_meant_is_refused_with_a_remedy() -> None:
    trainer, _, data = fitted(callback=quick())
    with pytest.raises(ConfigurationError, match="`retain` must be a DataLoader or a Dataset, got list"):
        trainer.unlearn([1], retain=[1, 2], **EDIT)
    assert trainer.unlearn([1], retain=Subset(data, range(2, 48)), **EDIT).n_retain == 46


# --------------------------------------------------------------------------------------------------------------------
# Data that are missing or damaged
# --------------------------------------------------------------------------------------------------------------------


def test_both_remedies_for_missing_training_data_work() -> None:
    model, batch = Classifier(), batch_of(blobs(), slice(4))
    trainer = make_trainer()
    attach(trainer, model, callback=quick())
    with pytest.raises(TrainingDataError, match=r"no training data.*`dataloader=`.*`train_dataloaders=`.*attach"):
        trainer.influence(batch)
    assert trainer.influence(batch, dataloader=loader(blobs())).n_train == 48
    attach(trainer, model, train_dataloaders=loader(blobs()))
    assert trainer.influence(batch).n_train == 48


@pytest.mark.parametrize("datamodule", [False, True])
def test_a_callback_that_was_forgotten_can_be_added_after_the_fit(datamodule: bool) -> None:
    data, batch = blobs(), batch_of(blobs(), slice(4))
    given = {"datamodule": pl.LightningDataModule.from_datasets(data, batch_size=8)} if datamodule else {}
    loaders = () if datamodule else (loader(data),)
    trainer, module = make_trainer(), Classifier()
    trainer.fit(module, *loaders, **given)
    with pytest.raises(AttributeError, match="'Trainer' object has no attribute 'influence'"):
        trainer.influence(batch)
    attach(trainer, module, callback=quick())
    report = trainer.influence(batch)
    assert torch.equal(report.scores, trainer.influence(batch, dataloader=loader(data)).scores)
    assert trainer.unlearn([3], **EDIT).n_retain == 47


def test_the_training_data_of_a_fit_are_not_taken_for_those_of_another_model() -> None:
    trainer, _, data = fitted()
    attach(trainer, Classifier())
    with pytest.raises(TrainingDataError, match=r"no training data.*`dataloader=`"):
        trainer.influence(batch_of(data, slice(4)))


def test_training_examples_with_nan_are_named_and_the_remedy_works() -> None:
    clean = blobs()
    x, y = (part.clone() for part in clean.tensors)
    x[7, 0] = x[30, 1] = torch.nan
    _, module, _ = fitted(callback=quick())
    trainer, batch = make_trainer(), batch_of(clean, slice(4))
    attach(trainer, module, train_dataloaders=loader(TensorDataset(x, y)), callback=quick())
    for call in (lambda: trainer.influence(batch), trainer.self_influence, lambda: trainer.unlearn([1], **EDIT)):
        with pytest.raises(NonFiniteError, match=r"at dataset indices \[7, 30\].*leave them out") as caught:
            call()
        assert str(caught.value).count("[7, 30]") == 1
    rest = Subset(TensorDataset(x, y), [index for index in range(48) if index not in (7, 30)])
    assert trainer.influence(batch, dataloader=loader(rest)).n_train == 46


def test_query_examples_with_nan_are_named_by_position() -> None:
    trainer, _, data = fitted(callback=quick())
    x, y = (part.clone() for part in batch_of(data, slice(6)))
    x[2, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"1 of 6 losses of the query batch .* at positions \[2\]"):
        trainer.influence((x, y))
    keep = [0, 1, 3, 4, 5]
    assert trainer.influence((x[keep], y[keep])).n_train == 48


def test_that_the_weights_are_not_finite_is_not_blamed_on_the_examples() -> None:
    trainer, module, data = fitted(callback=quick())
    with torch.no_grad():
        next(module.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="weights or buffers") as caught:
        trainer.influence(batch_of(data, slice(4)))
    assert "training examples are not finite" not in str(caught.value)


def test_a_checkpoint_given_as_an_edit_file_is_told_from_damage(tmp_path: Path) -> None:
    trainer, module, _ = fitted(callback=quick())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(EditError, match=r"last\.ckpt' is a zip archive, such as a checkpoint, not an edit file"):
        UnlearnReport.load(tmp_path / "last.ckpt")
    trainer.unlearn([3], **EDIT).save(tmp_path / "edit.safetensors")
    assert UnlearnReport.load(tmp_path / "edit.safetensors", module).n_forget == 1


# --------------------------------------------------------------------------------------------------------------------
# Plots
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_path_given_to_plot_is_the_file_that_it_is_saved_to(tmp_path: Path) -> None:
    trainer, _, data = fitted(callback=quick())
    report, edit = trainer.influence(batch_of(data, slice(3)), per_example=True), trainer.unlearn([3], **EDIT)
    report.plot(str(tmp_path / "first.png"))
    report.plot(0).savefig(tmp_path / "expected.png", dpi=150)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    report.plot(2, path=tmp_path / "third.png")
    assert (tmp_path / "third.png").read_bytes() != (tmp_path / "first.png").read_bytes()
    edit.plot(tmp_path / "edit.svg")
    assert (tmp_path / "edit.svg").read_text().startswith("<?xml")
    for one in (report, edit):
        with pytest.raises(ConfigurationError, match=r"cannot be saved to .*plot\.picture.*\.png, \.pdf or \.svg"):
            one.plot(tmp_path / "plot.picture")


# --------------------------------------------------------------------------------------------------------------------
# Losses of words
# --------------------------------------------------------------------------------------------------------------------


class Tagger(pl.LightningModule):
    """Gives each word a tag. It has no ``forward``, and its padding has no tag."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 4), nn.Linear(4, 3)

    def predict_tags(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.words(x))))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.predict_tags(batch["ids"])
        return F.cross_entropy(logits.transpose(1, 2), batch["tags"], ignore_index=-100)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_the_lines_for_losses_of_words_average_over_the_words_that_count() -> None:
    torch.manual_seed(0)
    data = [{"ids": torch.randint(1, 9, (5,)), "tags": torch.randint(0, 3, (5,))} for _ in range(12)]
    for one in data[::3]:
        one["ids"][3:], one["tags"][3:] = 0, -100
    trainer, module, _ = fitted(Tagger(), data, callback=quick())
    query = torch.utils.data.default_collate(data[:4])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.influence(query)
    text = next(str(one.message) for one in caught if "def influence_loss" in str(one.message))
    code = textwrap.dedent(text[text.index("    def influence_loss") : text.index("\n\nOr pass")])
    assert "predictions = ...  # from x, as in your training_step" in code  # no child predicts alone
    code = code.replace("...", "self.predict_tags(x).transpose(1, 2)")
    names = {"F": F}
    exec(code, names)
    losses = names["influence_loss"](module, query)
    assert losses.shape == (4,)
    single = [module.training_step({key: value[i : i + 1] for key, value in query.items()}, 0) for i in range(4)]
    torch.testing.assert_close(losses, torch.stack(single))


def test_a_number_of_snapshots_belongs_to_the_callback() -> None:
    trainer, *_ = fitted(callback=quick())
    with pytest.raises(ConfigurationError, match=r"must be True, False or None, got 3\. .* GIFCallback\(snapshots=3\)"):
        trainer.self_influence(snapshots=3)  # type: ignore[arg-type]
