"""How the examples to forget, their new labels, the retained and the unseen examples are given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import (
    BatchError,
    ConfigurationError,
    GIFCallback,
    GIFWarning,
    NonFiniteError,
    ObjectiveError,
    TrainingDataError,
)
from lightning_gif.unlearning.protocol import GoalName

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights
from .doubles import memorised


@pytest.mark.parametrize("relabel", [2, torch.tensor([2, 2, 2, 2]), lambda batch: torch.full((len(batch[1]),), 2)])
def test_labels_can_be_given_as_a_class_a_tensor_or_a_function(relabel: Any) -> None:
    trainer, module, dataset = fitted()
    forget = batch_of(dataset, torch.arange(0, 12, 3))  # four examples of class 0
    expected = trainer.unlearn(forget, relabel=torch.full((4,), 2), dry_run=True)
    found = trainer.unlearn(forget, relabel=relabel)
    assert found.relabelled == expected.relabelled
    assert found.relabelled is not None
    assert found.relabelled.after < found.relabelled.before
    loss = F.cross_entropy(module.eval()(forget[0]), torch.full((4,), 2)).item()
    assert loss == pytest.approx(found.relabelled.after, rel=1e-5)


def test_a_relabelled_loader_takes_targets_in_dataset_order() -> None:
    trainer, _, dataset = fitted()
    chosen = [3, 30, 12, 6]
    new = torch.tensor([1, 2, 1, 2])
    expected = trainer.unlearn(batch_of(dataset, chosen), relabel=new, dry_run=True)
    found = trainer.unlearn(DataLoader(Subset(dataset, chosen), 3), relabel=new, dry_run=True)
    assert found.relabelled is not None
    assert expected.relabelled is not None
    assert found.relabelled.after == pytest.approx(expected.relabelled.after)


def test_examples_are_found_by_content_and_by_index_alike() -> None:
    trainer, _, dataset = fitted()
    chosen = [5, 17, 40]
    by_content = trainer.unlearn(batch_of(dataset, chosen), dry_run=True)
    by_index = trainer.unlearn(DataLoader(Subset(dataset, chosen), 2), dry_run=True)
    nested = trainer.unlearn(DataLoader(Subset(Subset(dataset, range(5, 48)), [0, 12, 35]), 2), dry_run=True)
    for report in (by_content, by_index, nested):
        assert (report.n_forget, report.n_found, report.n_retain) == (3, 3, 45)
        assert report.retain == pytest.approx(by_content.retain)


def test_what_to_forget_can_be_given_as_indices_or_as_a_predicate() -> None:
    trainer, _, dataset = fitted()
    chosen = [40, 5, 17]
    expected = trainer.unlearn(DataLoader(Subset(dataset, chosen), 2), dry_run=True)
    by_index = trainer.unlearn(chosen, dry_run=True)
    wanted = dataset.tensors[0][chosen]
    asked = trainer.unlearn(lambda batch: (batch[0][:, None] == wanted).all(-1).any(-1), dry_run=True)
    for report in (by_index, asked):
        assert (report.n_forget, report.n_found, report.n_retain) == (3, 3, 45)
        assert tuple(report.forget) == pytest.approx(tuple(expected.forget), rel=1e-3)
        assert tuple(report.retain) == pytest.approx(tuple(expected.retain), rel=1e-3)
    of_class = trainer.unlearn(lambda batch: batch[1] == 1, dry_run=True)
    assert (of_class.n_forget, of_class.n_retain, of_class.goal) == (16, 32, GoalName.CLASS)
    assert trainer.unlearn(range(4), dry_run=True).n_forget == 4


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, numpy.array, lambda ids: list(numpy.array(ids))])
def test_new_labels_come_in_the_order_of_the_indices(kind: Any) -> None:
    trainer, _, dataset = fitted()
    new = torch.tensor([1, 2, 0])
    expected = trainer.unlearn(batch_of(dataset, [40, 5, 17]), relabel=new, dry_run=True)
    found = trainer.unlearn(kind([40, 5, 17]), relabel=new, dry_run=True)
    assert found.relabelled is not None
    assert expected.relabelled is not None
    assert found.relabelled.after == pytest.approx(expected.relabelled.after, rel=1e-4)
    with pytest.raises(TrainingDataError, match="given twice"):
        trainer.unlearn(kind([5, 5, 17]))


def test_only_the_training_examples_of_a_loader_can_be_named() -> None:
    """A loader over part of a dataset: indices mean the dataset that the loader is over."""
    dataset = blobs()
    trainer, _, _ = fitted(dataset=Subset(dataset, range(10, 48)))  # type: ignore[arg-type]
    assert trainer.unlearn([0, 37], dry_run=True).n_retain == 36
    with pytest.raises(
        TrainingDataError, match=r"1 of the \d+ given dataset indices belong to no training example: \[38\]"
    ):
        trainer.unlearn([0, 38])


@pytest.mark.parametrize(
    ("predicate", "error", "match"),
    [
        (lambda batch: batch[1] > 5, TrainingDataError, "true for none of the 48"),
        (lambda batch: batch[1], BatchError, r"a bool tensor of shape \[48\]; it returned int64"),
        (lambda batch: True, BatchError, "it returned bool"),
        (lambda batch: (batch[1] == 1)[:3], BatchError, r"it returned bool\[3\]"),
        (lambda one: one[1].item() == 1, BatchError, "truth values: RuntimeError: .* It was called with a whole batch"),
        (lambda batch: numpy.array([None] * len(batch[1])), BatchError, "returned no truth values: TypeError"),
        (lambda batch: ["a"] * len(batch[1]), BatchError, "returned no truth values: ValueError"),
    ],
)
def test_a_predicate_that_selects_nothing_or_is_none_is_refused(predicate: Any, error: Any, match: str) -> None:
    trainer, module, _ = fitted()
    before = weights(module)
    with pytest.raises(error, match=match):
        trainer.unlearn(predicate)
    assert same_weights(before, weights(module))


@pytest.mark.parametrize(
    "kind", [torch.Tensor.tolist, torch.Tensor.numpy, lambda mask: mask.numpy()[::-1].copy()[::-1]]
)
def test_a_predicate_can_return_a_list_or_an_array(kind: Any) -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(lambda batch: kind(batch[1] == 1), dry_run=True)
    assert report.n_forget == int((dataset.tensors[1] == 1).sum())


def test_unseen_examples_with_a_loss_that_is_not_finite_are_refused() -> None:
    trainer, module, _, unseen = memorised()
    before = weights(module)
    unseen.tensors[0][7] = math.nan
    with pytest.raises(NonFiniteError, match="unseen batch"):
        trainer.unlearn(list(range(24)), unseen=loader(unseen))
    assert same_weights(before, weights(module))


def test_the_validation_data_of_fit_are_unseen_examples() -> None:
    trainer, module, dataset = make_trainer(GIFCallback(ratio=0.5), max_epochs=5), Classifier(), blobs()
    trainer.fit(module, loader(dataset), [loader(blobs(30, seed=5), shuffle=False)])
    # Whatever the trainer ran since: neither no data, nor test data.
    trainer.test(module, loader(blobs(20, seed=6), shuffle=False), verbose=False)
    trainer.validate(module, loader(blobs(20, seed=6), shuffle=False), verbose=False)
    report = trainer.unlearn(range(20), dry_run=True)
    assert report.n_unseen == 30
    assert trainer.unlearn(range(20), unseen=False, dry_run=True).n_unseen == 0
    given = trainer.unlearn(range(20), unseen=loader(blobs(30, seed=5)), dry_run=True)
    assert report.memorization == given.memorization
    assert trainer.unlearn(lambda batch: batch[1] == 0, dry_run=True).n_unseen == 0  # a class needs none


def test_data_that_were_trained_on_are_not_unseen() -> None:
    trainer, module, dataset = make_trainer(GIFCallback(ratio=0.5)), Classifier(), blobs()
    trainer.fit(module, loader(dataset), loader(dataset, shuffle=False))
    report = trainer.unlearn(range(20), dry_run=True)
    assert report.n_unseen == 0
    assert any("not used as unseen examples: they have examples of the training data" in n for n in report.notes)
    with pytest.raises(ConfigurationError, match="examples of the training data"):
        trainer.unlearn([0, 1, 2], unseen=loader(Subset(dataset, range(40))))


def test_validation_data_of_another_kind_are_no_unseen_examples() -> None:
    class Other(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_norm", batch[0].norm())

    trainer, module, dataset = make_trainer(GIFCallback(ratio=0.5)), Other(), blobs()
    trainer.fit(module, loader(dataset), DataLoader(TensorDataset(torch.randn(8, 2)), 4))
    report = trainer.unlearn(range(20), dry_run=True)
    assert report.n_unseen == 0
    assert any("not used as unseen examples: The unseen batch does not have" in note for note in report.notes)
    assert not any("unseen" in note for note in trainer.unlearn(range(20), unseen=False, dry_run=True).notes)
    assert not any("unseen" in note for note in trainer.unlearn([3], relabel=2, dry_run=True).notes)  # needs none
    with pytest.raises(BatchError, match="unseen batch"):
        trainer.unlearn([0, 1, 2], unseen=DataLoader(TensorDataset(torch.randn(8, 2)), 4))
    with pytest.raises(ConfigurationError, match="`unseen` must be a DataLoader"):
        trainer.unlearn([0, 1, 2], unseen=[1, 2])


def test_several_validation_loaders_are_not_used_and_a_note_says_so() -> None:
    trainer, module = make_trainer(GIFCallback(ratio=0.5)), Classifier()

    def validate(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        Classifier.validation_step(module, batch, batch_idx)

    module.validation_step = validate  # type: ignore[method-assign]
    trainer.fit(module, loader(blobs()), [loader(blobs(30, seed=seed), shuffle=False) for seed in (5, 6)])
    report = trainer.unlearn(range(20), dry_run=True)
    assert report.n_unseen == 0
    assert any("not used as unseen examples: they are not one DataLoader" in note for note in report.notes)


def test_validation_data_that_cannot_be_read_end_the_call_and_not_the_comparison() -> None:
    class Disk(TensorDataset):
        gone = False

        def __getitem__(self, index: Any) -> Any:
            if self.gone:
                raise OSError("disk gone")
            return super().__getitem__(index)

    trainer, module = make_trainer(GIFCallback(ratio=0.5)), Classifier()
    unseen = Disk(*blobs(30, seed=5).tensors)
    trainer.fit(module, loader(blobs()), loader(unseen, shuffle=False))
    before = weights(module)
    unseen.gone = True
    with pytest.raises(OSError, match="disk gone"):
        trainer.unlearn(range(20))
    assert same_weights(before, weights(module))
    assert trainer.unlearn(range(20), unseen=False, dry_run=True).n_unseen == 0


def test_examples_that_the_model_never_saw_are_refused() -> None:
    trainer, module, dataset = fitted()
    before = weights(module)
    x, y = batch_of(dataset, slice(0, 4))
    with pytest.raises(TrainingDataError, match="None of the 4 forget examples is in the training data"):
        trainer.unlearn((x + 1, y))
    assert same_weights(before, weights(module))


def test_all_copies_of_an_example_are_forgotten() -> None:
    x, y = blobs().tensors
    dataset = TensorDataset(torch.cat([x, x[:1].expand(5, -1)]), torch.cat([y, y[:1].expand(5)]))
    trainer, _, _ = fitted(dataset=dataset)
    report = trainer.unlearn((x[:1], y[:1]), dry_run=True)
    assert (report.n_forget, report.n_found, report.n_retain) == (1, 6, 47)
    assert any("6 copies" in note for note in report.notes)


def test_data_to_keep_that_is_to_be_forgotten_is_not_kept() -> None:
    trainer, _, dataset = fitted()
    with pytest.warns(GIFWarning, match="3 of the examples given as `retain`"):
        report = trainer.unlearn(batch_of(dataset, slice(0, 3)), retain=loader(dataset), dry_run=True)
    assert report.n_retain == 45


def test_examples_are_identified_by_their_texts() -> None:
    class Texts(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            lengths = torch.tensor([[float(len(text)), text.count("a")] for text in batch[0]])
            return F.cross_entropy(self(lengths), batch[1])

    words = ["a" * i + "b" * (i % 5) for i in range(1, 25)]
    dataset = [(word, i % 2) for i, word in enumerate(words)]
    trainer, _, _ = fitted(Texts(nn.Linear(2, 2), lr=1e-3), dataset)  # type: ignore[arg-type]
    report = trainer.unlearn((words[:2], torch.tensor([0, 1])), targets="cached", dry_run=True)
    assert (report.n_found, report.n_retain, report.goal) == (2, 22, GoalName.EXAMPLES)


def test_examples_that_are_not_in_the_training_data_are_pointed_out() -> None:
    trainer, _, dataset = fitted()
    x, y = batch_of(dataset, slice(0, 4))
    with pytest.warns(GIFWarning, match="2 of the 4 forget examples were not found"):
        report = trainer.unlearn((torch.cat([x[:2], x[2:] + 1]), y), dry_run=True)
    assert report.n_found == 2
    assert any("not found" in note for note in report.notes)


def test_the_retained_data_can_be_given() -> None:
    trainer, _, dataset = fitted()
    keep = list(range(10, 30))
    report = trainer.unlearn(batch_of(dataset, slice(0, 4)), retain=DataLoader(Subset(dataset, keep), 8), dry_run=True)
    assert report.n_retain == 20
    module = trainer.lightning_module.eval()
    x, y = batch_of(dataset, keep)
    assert report.retain.before == pytest.approx(F.cross_entropy(module(x), y).item(), rel=1e-5)


@pytest.mark.parametrize("given", [17, [1.5], slice(3), "all", torch.tensor(3)])
def test_what_names_no_examples_is_refused_with_what_would(given: Any) -> None:
    trainer, _, _ = fitted()
    with pytest.raises(BatchError, match="a list of indices of the training dataset"):
        trainer.unlearn(given)


def test_labels_that_the_examples_have_are_no_correction() -> None:
    trainer, _, dataset = fitted()
    with pytest.raises(ObjectiveError, match="equal the old ones"):
        trainer.unlearn([0, 1], relabel=dataset.tensors[1][:2].tolist())


@pytest.mark.mostly_slow(2)
@pytest.mark.parametrize(
    "kind",
    [
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        lambda labels: labels.numpy()[0],
        lambda labels: labels.numpy()[::-1],
        lambda labels: lambda batch: [2] * len(batch[1]),
    ],
)
def test_new_labels_can_be_arrays_lists_and_numbers_of_numpy(kind: Callable[[Tensor], Any]) -> None:
    trainer, _, _ = fitted()
    new = torch.tensor([2, 2, 2])
    expected = trainer.unlearn([0, 1, 2], relabel=new, dry_run=True)
    assert trainer.unlearn([0, 1, 2], relabel=kind(new), dry_run=True).relabelled == expected.relabelled


@pytest.mark.parametrize("label", [-1, -100, 3])
def test_new_labels_that_are_no_class_are_refused(label: int) -> None:
    trainer, _, _ = fitted()
    with pytest.raises(BatchError, match=f"`relabel` has the label {label}, but the model predicts 3 classes: 0 to 2"):
        trainer.unlearn([0, 1, 2], relabel=torch.tensor([1, label, 1]))
