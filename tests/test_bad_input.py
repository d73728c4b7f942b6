"""Every invalid input raises the right error with a helpful message, and changes nothing."""

from __future__ import annotations

import contextlib
import json
import math
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_gif import (
    BatchError,
    ConfigurationError,
    ConvergenceError,
    EditError,
    GIFCallback,
    GIFMixin,
    GIFWarning,
    NonFiniteError,
    ObjectiveError,
    SelectionError,
    TrainingDataError,
    UnlearnReport,
)
from lightning_gif.data.structure import describe
from lightning_gif.storage.digests import digest

from .conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from .doubles import quick

BAD_ARGUMENTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"ratio": 0}, ["`ratio`", "above 0", "got 0", "share"]),
    ({"ratio": 1.5}, ["`ratio`", "at most 1.0", "got 1.5"]),
    ({"ratio": -0.1}, ["`ratio`", "got -0.1"]),
    ({"ratio": float("nan")}, ["`ratio`", "got nan"]),
    ({"ratio": "0.1"}, ["`ratio`", "got '0.1'"]),
    ({"ratio": True}, ["`ratio`", "got True"]),
    ({"ratio": 0.6, "selector": "exclusive_k_outputs"}, ["`ratio`", "at most 0.5", "exclusive_k_outputs", "got 0.6"]),
    ({"selector": "higest_k_gradients"}, ["selector", "'higest_k_gradients'", "Did you mean 'highest_k_gradients'"]),
    ({"selector": "zzz"}, ["selector", "'zzz'", "Known:", "random"]),
    ({"selector": []}, ["`selector`", "got []", "random"]),
    ({"selector": [1]}, ["`selector`", "got [1]"]),
    ({"selector": None}, ["`selector`", "got None"]),
    ({"selector": 3}, ["`selector`", "got 3"]),
    ({"method": "gf"}, ["method", "'gf'", "Did you mean 'gif'"]),
    ({"method": None}, ["method", "None", "gif"]),
    ({"solver": "lisa"}, ["solver", "'lisa'", "Did you mean 'lissa'"]),
    ({"solver": ["lissa"]}, ["solver", "['lissa']"]),
    ({"damping": -1.0}, ["`damping`", "at least 0", "got -1.0"]),
    ({"damping": "1"}, ["`damping`", "got '1'"]),
    ({"damping": float("nan")}, ["`damping`", "got nan"]),
    ({"damping": float("inf")}, ["`damping`", "got inf"]),
    ({"max_iter": 0}, ["`max_iter`", "at least 1", "got 0"]),
    ({"max_iter": 2.5}, ["`max_iter`", "whole number", "got 2.5"]),
    ({"rtol": 0.0}, ["`rtol`", "between 0 and 1", "got 0.0"]),
    ({"rtol": 1}, ["`rtol`", "got 1"]),
    ({"rtol": "0.1"}, ["`rtol`", "got '0.1'"]),
    ({"batch_size": 0}, ["`batch_size`", "got 0"]),
    ({"batch_size": True}, ["`batch_size`", "got True"]),
    ({"curvature_examples": 0}, ["`curvature_examples`", "None (all)", "got 0"]),
    ({"curvature_examples": "all"}, ["`curvature_examples`", "'auto', None (all)", "got 'all'"]),
    ({"curvature": "gnn"}, ["curvature", "'gnn'", "Did you mean 'ggn'"]),
    ({"curvature": None}, ["curvature", "None", "hessian"]),
    ({"curvature_sampling": "ballanced"}, ["curvature sampling", "Did you mean 'balanced'"]),
    ({"weight_decay": -1e-4}, ["`weight_decay`", "at least 0", "got -0.0001"]),
    ({"weight_decay": float("nan")}, ["`weight_decay`", "got nan"]),
    ({"discrepancy": 1.0}, ["`discrepancy`", "below 1", "got 1.0"]),
    ({"eigenvalues": -1}, ["`eigenvalues`", "got -1"]),
    ({"eigenvalues": True}, ["`eigenvalues`", "got True"]),
    ({"memory": -1}, ["`memory`", "GiB", "got -1"]),
    ({"memory": "1GB"}, ["`memory`", "got '1GB'"]),
    ({"double": 1}, ["`double`", "True or False", "got 1"]),
    ({"unconverged": "crash"}, ["`unconverged`", "'warn', 'raise' or 'ignore'", "got 'crash'"]),
    ({"seed": -1}, ["`seed`", "got -1"]),
    ({"seed": 1.0}, ["`seed`", "got 1.0"]),
]


def expect(error: BaseException, words: list[str]) -> None:
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"{missing} not in: {error}"


def state(module: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {
            name: (id(tensor), tensor.detach().clone())
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        },
        "grad": {name: p.grad is None for name, p in module.named_parameters()},
        "training": {name: m.training for name, m in module.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in module.named_modules()},
        "hooks": {name: len(m._forward_hooks) for name, m in module.named_modules()},
        "rng": (torch.get_rng_state(), random.getstate(), numpy.random.get_state()),  # noqa: NPY002
        "grad mode": torch.is_grad_enabled(),
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, numpy.ndarray):
        return bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@contextlib.contextmanager
def refused(module: nn.Module, error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises this error with these words, and the module and the random state are as before."""
    before = state(module)
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value).__name__ == error.__name__  # not of a subclass
    expect(caught.value, list(words))
    after = state(module)
    assert [key for key in before if not equal(before[key], after[key])] == []


class Normalised(Classifier):
    """Buffers and modes that a failed call could leave changed."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3)))


def ready(
    module: pl.LightningModule | None = None, **options: Any
) -> tuple[pl.Trainer, pl.LightningModule, tuple[Tensor, ...]]:
    """A fitted trainer, its module in training mode with one part frozen in evaluation mode, and a batch."""
    trainer, module, data = fitted(Normalised() if module is None else module, callback=quick(**options), max_epochs=1)
    module.train()
    next(iter(module.net.children())).eval()
    return trainer, module, batch_of(data, slice(4))


# --------------------------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "words"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_the_constructor_refuses_bad_arguments(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        GIFCallback(**arguments)
    expect(caught.value, words)


def test_a_call_refuses_bad_overrides_and_changes_nothing() -> None:
    trainer, module, batch = ready()
    for arguments, words in BAD_ARGUMENTS:
        for call in (trainer.influence, trainer.unlearn):
            with refused(module, ConfigurationError, *words):
                call(batch, **arguments)


@pytest.mark.parametrize("call", ["influence", "unlearn"])
def test_unknown_arguments_of_a_call_suggest_the_nearest_name(call: str) -> None:
    trainer, module, batch = ready()
    with refused(module, ConfigurationError, "'dampening'", "Did you mean 'damping'"):
        getattr(trainer, call)(batch, dampening=0.1)
    with refused(module, ConfigurationError, "'zzz'", "Known:", "ratio"):
        getattr(trainer, call)(batch, zzz=1)


@pytest.mark.parametrize("k", [0, -1, 2.0, "3", True, None])
def test_invalid_values_of_k_are_refused(k: Any) -> None:
    trainer, module, batch = ready()
    with refused(module, ConfigurationError, "`k`", "at least 1", f"got {k!r}"):
        trainer.influence(batch, k=k)
    with refused(module, ConfigurationError, "`k`", "at least 1", f"got {k!r}"):
        trainer.influence(batch, k=k, keep=5)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("serch", ["Unknown `step` strategy 'serch'", "Did you mean 'search'?"]),
        *((bad, ["a finite number, or a function", f"got {bad!r}"]) for bad in (True, math.nan, math.inf, None, [1.0])),
    ],
)
def test_invalid_steps_are_refused(step: Any, expected: list[str]) -> None:
    trainer, module, batch = ready()
    with refused(module, ConfigurationError, "step", *expected):
        trainer.unlearn(batch, step=step)


@pytest.mark.parametrize("call", ["influence", "unlearn"])
@pytest.mark.parametrize("targets", ["cache", False, 1, ["cached"]])
def test_invalid_targets_are_refused(call: str, targets: Any) -> None:
    trainer, module, batch = ready()
    with refused(module, ConfigurationError, "`targets`", "'cached', 'class' or 'batch'", f"got {targets!r}"):
        getattr(trainer, call)(batch, targets=targets)


def test_targets_by_class_need_classes() -> None:
    class Regression(Normalised):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    trainer, module, (x, y) = ready(Regression())
    data = loader([(a, b.float()) for a, b in blobs()])
    with refused(module, SelectionError, "targets='class'", "whole numbers", "targets='cached' or 'batch'"):
        trainer.influence((x, y.float()), targets="class", dataloader=data)


def test_a_solve_that_does_not_converge_raises_on_request() -> None:
    trainer, module, batch = ready()
    for call in (trainer.influence, trainer.unlearn):
        with refused(module, ConvergenceError, "max_iter", "rtol", "Raise `max_iter` or `damping`"):
            call(batch, max_iter=1, rtol=1e-9, unconverged="raise")


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------

X, Y = batch_of(blobs(), slice(4))


NO_BATCH = "said by each call in its own words"


@pytest.mark.parametrize("none", [[], (), range(0), numpy.array([], int), torch.tensor([], dtype=torch.long)])
def test_empty_data_are_refused(none: Any) -> None:
    trainer, module, _ = ready()
    with refused(module, TrainingDataError, "No dataset index was given"):
        trainer.unlearn(none)
    with refused(module, TrainingDataError, "No dataset index was given"):
        trainer.influence((X, Y), among=none)


def test_an_empty_list_is_not_a_query() -> None:
    trainer, module, _ = ready()
    with refused(module, BatchError, "list of 0"):
        trainer.influence([])


@pytest.mark.parametrize("call", ["influence", "unlearn"])
@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": X, "y": Y}, ["have the structure of", "'x'", "A batch of 5 training examples", "float32[4, 6]"]),
        ((X, Y, Y), ["have the structure of", "A batch of 5 training examples"]),
        (X, ["have the structure of", "float32[4, 6]", "A batch of 5 training examples"]),
        ((X[0], Y[0]), ["float32[6]", "A batch of 5 training examples"]),
        ((X, Y[:3]), ["disagree", "int64[3]"]),
        ((X[:, :5], Y), ["could not be computed", "float32[4, 5]", "A batch of 5 training examples", "float32[5, 6]"]),
        ((X, Y + 7), ["could not be computed", "A batch of 5 training examples"]),
        ((X[:0], Y[:0]), ["empty", "float32[0, 6]", "at least one"]),
        (None, [NO_BATCH, "NoneType"]),
        ("images", [NO_BATCH, "str"]),
        ((X.numpy(), Y.numpy()), [NO_BATCH, "NumPy array float32[4, 6]", "torch.as_tensor"]),
        (torch.tensor(1.0), [NO_BATCH, "float32[]"]),
    ],
    ids=[
        *("mapping", "too long", "no targets", "no batch dimension", "disagreeing", "features", "classes", "empty"),
        *("none", "string", "arrays", "scalar"),
    ],
)
def test_batches_of_another_structure_are_refused(call: str, batch: Any, words: list[str]) -> None:
    trainer, module, _ = ready()
    no_batch = {"influence": "at least one tensor", "unlearn": "a list of indices of the training dataset"}[call]
    with refused(module, BatchError, *(no_batch if word == NO_BATCH else word for word in words)):
        getattr(trainer, call)(batch)


def test_self_influence_refuses_a_batch() -> None:
    trainer, module, batch = ready()
    for given in (batch, [3, 4]):
        with refused(
            module, ConfigurationError, "takes no batch", describe(given), "among=", "trainer.influence(batch)"
        ):
            trainer.self_influence(given)


@pytest.mark.parametrize("targets", ["class", "batch", "all", 3])
def test_self_influence_refuses_targets_that_it_does_not_have(targets: Any) -> None:
    trainer, _, _ = fitted()
    with pytest.raises(ConfigurationError, match=f"None .all parameters. or 'cached'.* got {targets!r}"):
        trainer.self_influence(targets=targets)


@pytest.mark.parametrize("given", [[3], (3, 4, 5, 6), range(2), 3])
def test_indices_are_not_a_query(given: Any) -> None:
    trainer, module, _ = ready()
    with refused(module, BatchError, "DataLoader(Subset(", describe(given)):
        trainer.influence(given)


@pytest.mark.parametrize("call", ["influence", "unlearn"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_batches_that_are_not_finite_are_refused(call: str, value: float) -> None:
    trainer, module, (x, y) = ready()
    x = x.clone()
    x[1, 2] = value
    with refused(module, NonFiniteError, "1 of 4 losses", "1 non-finite value", "Nothing was changed"):
        getattr(trainer, call)((x, y))


def test_training_data_that_are_not_finite_are_refused() -> None:
    trainer, module, batch = ready()
    data = blobs()
    data.tensors[0][7, 0] = torch.nan
    for call in (trainer.influence, trainer.unlearn):
        with refused(module, NonFiniteError, "non-finite"):
            call(batch, dataloader=loader(data))


def test_a_single_bad_training_example_outside_of_the_curvature_sample_is_refused_too() -> None:
    trainer, module, batch = ready()
    data = blobs()
    for position in range(24):  # any sample of 8 misses at least one of these
        data.tensors[0][2 * position, 0] = torch.nan
    with refused(module, NonFiniteError, "finite"):
        trainer.influence(batch, dataloader=loader(data), curvature_examples=8)


@pytest.mark.parametrize("call", ["influence", "unlearn"])
def test_a_loss_that_uses_the_state_of_a_metric_is_refused(call: str) -> None:
    class Weighted(Normalised):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = MulticlassAccuracy(3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            logits = self(x)
            self.accuracy.update(logits, y)
            return F.cross_entropy(logits, y) * (1 + self.accuracy.compute())

    trainer, module, batch = ready(Weighted())
    with refused(module, NonFiniteError, "4 of 4 losses", "torchmetrics", "Nothing was changed"):
        getattr(trainer, call)(batch)


# --------------------------------------------------------------------------------------------------------------------
# Models and targets
# --------------------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Parameters, but no Linear and no Conv layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 3))
        self.part = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) @ self.table


def test_a_model_without_linear_and_conv_layers_has_targets() -> None:
    trainer, _, batch = ready(Classifier(Table()))
    assert trainer.unlearn(batch, dry_run=True).edit.indices["net.table"].tolist() != []
    assert trainer.influence(batch, selector=["net.table"]).targets.count == 18


def test_names_that_match_nothing_or_frozen_parameters_are_refused() -> None:
    module = Normalised()
    module.net[0].requires_grad_(False)
    trainer, module, batch = ready(module)
    with refused(module, SelectionError, "'net.3.wieght'", "Did you mean 'net.3.weight'"):
        trainer.influence(batch, selector=["net.3.wieght"])
    for call in (trainer.influence, trainer.unlearn):
        with refused(module, SelectionError, "'net.0.weight'", "trainable parameter"):
            call(batch, selector=["net.0.weight"])


def test_names_that_the_module_does_not_allow_are_refused() -> None:
    class HeadOnly(GIFMixin, Normalised):
        def influence_parameters(self) -> list[str]:
            return ["net.3.*"]

    trainer, module, batch = ready(HeadOnly())
    with refused(module, SelectionError, "net.0.weight", "influence_parameters", "net.3.*"):
        trainer.unlearn(batch, selector=["net.0.weight"])


def test_a_model_without_trainable_parameters_is_refused() -> None:
    trainer, module, batch = ready()
    module.requires_grad_(False)
    for call in (trainer.influence, trainer.unlearn):
        with refused(module, SelectionError, "Normalised", "requires_grad=False", "Unfreeze"):
            call(batch)


def test_parameters_that_were_frozen_after_training_are_refused() -> None:
    trainer, module, batch = ready()
    module.net[0].requires_grad_(False)
    with refused(module, SelectionError, "'net.0.weight'", "frozen"):
        trainer.influence(batch, targets="cached")


def test_a_ratio_that_selects_nothing_is_refused() -> None:
    trainer, module, batch = ready()
    with refused(module, SelectionError, "empty", "Raise `ratio`"):
        trainer.unlearn(batch, ratio=0.001)


@pytest.mark.parametrize("call", ["influence", "unlearn"])
def test_a_loss_that_does_not_depend_on_the_targets_is_refused(call: str) -> None:
    class Detached(Normalised):
        def forward(self, x: Tensor) -> Tensor:
            return self.net[1:](self.net[0](x).detach())

    trainer, module, batch = ready(Detached())
    with refused(module, ObjectiveError, "exactly zero", "targets='batch'", "method='if'"):
        getattr(trainer, call)(batch, selector=["net.0.*"])


def test_a_query_without_a_gradient_is_refused_without_advice_that_was_followed() -> None:
    class Constant(GIFMixin, Normalised):
        def influence_measurement(self, batch: Any) -> Tensor:
            return 0 * self(batch[0]).sum(1)

    trainer, module, batch = ready(Constant())
    with refused(module, ObjectiveError, "does not depend on the parameters", "Query other examples"):
        trainer.influence(batch)
    with pytest.raises(ObjectiveError, match=r"^(?!.*method='if')"):
        trainer.influence(batch)


def test_measurements_that_are_not_finite_or_have_another_shape_are_refused() -> None:
    class Measuring(GIFMixin, Normalised):
        def influence_loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1], reduction="none")

        def influence_measurement(self, batch: Any) -> Tensor:
            return self.influence_loss(batch).mean() if self.mean else self.influence_loss(batch).log() * torch.nan

    module = Measuring()
    module.mean = True
    trainer, module, batch = ready(module)
    with refused(module, ObjectiveError, "Measuring.influence_measurement", "(B,)", "[]"):
        trainer.influence(batch)
    module.mean = False
    with refused(module, NonFiniteError, "not finite"):
        trainer.influence(batch)


@pytest.mark.parametrize("call", ["influence", "unlearn"])
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda losses: losses.mean(), ["[]"]),
        (lambda losses: losses[:, None], ["[48, 1]"]),
        (lambda losses: losses[:2], ["[2]"]),
        (lambda losses: None, ["NoneType"]),
    ],
    ids=["scalar", "column", "too few", "none"],
)
def test_a_loss_of_the_wrong_shape_is_refused(call: str, loss: Any, words: list[str]) -> None:
    class Wrong(GIFMixin, Normalised):
        def influence_loss(self, batch: Any) -> Any:
            return loss(F.cross_entropy(self(batch[0]), batch[1], reduction="none"))

    trainer, module, batch = ready(Wrong())
    with refused(module, ObjectiveError, "Wrong.influence_loss", "one value for each example", "(B,)", *words):
        getattr(trainer, call)(batch)


# --------------------------------------------------------------------------------------------------------------------
# Training data
# --------------------------------------------------------------------------------------------------------------------


def test_a_call_before_any_run_raises_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="influence"):
        make_trainer(quick()).influence((X, Y))


def test_a_call_before_fit_reports_what_is_missing() -> None:
    module, trainer = Normalised(), make_trainer(quick())
    trainer.validate(module, loader(blobs(), shuffle=False), verbose=False)
    with refused(module, TrainingDataError, "no training data", "dataloader="):
        trainer.influence((X, Y))
    with refused(module, SelectionError, "no cached targets", "Call fit", "targets='batch'", "attach"):
        trainer.influence((X, Y), targets="cached", dataloader=loader(blobs()))
    assert trainer.influence((X, Y), dataloader=loader(blobs())).scores.shape == (1, 48)
    assert trainer.influence((X, Y), targets="batch", dataloader=loader(blobs())).scores.shape == (1, 48)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([1, 2, 3], ["DataLoader", "list"]),
        (blobs(), ["DataLoader", "TensorDataset"]),
        (DataLoader(blobs(), batch_size=None), ["batch_size=None", "dataloader="]),
        (DataLoader(blobs(0)), ["no examples"]),
    ],
    ids=["list", "dataset", "no batches", "empty"],
)
def test_training_data_without_dataset_indices_are_refused(data: Any, words: list[str]) -> None:
    trainer, module, batch = ready()
    for call in (trainer.influence, trainer.unlearn):
        with refused(module, TrainingDataError, *words):
            call(batch, dataloader=data)


def test_unlearning_all_examples_is_refused() -> None:
    trainer, module, _ = ready()
    with refused(module, TrainingDataError, "All training examples", "nothing would be retained", "Train a new model"):
        trainer.unlearn(tuple(blobs().tensors))


# --------------------------------------------------------------------------------------------------------------------
# Relabelling
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relabel", "words"),
    [
        (torch.zeros(3, dtype=torch.long), ["3 targets", "4 examples", "one target for each"]),
        (torch.zeros(4, 2, dtype=torch.long), ["[4, 2]", "[4]", "one new target for each"]),
        (lambda batch: batch[1][:2], ["[2]", "[4]"]),
        (9, ["`relabel`", "the label 9", "predicts 3 classes: 0 to 2"]),
        (-1, ["label -1", "predicts 3 classes: 0 to 2"]),
        (["a", "b", "c", "d"], ["`relabel`", "numbers", "'a'"]),
        ([[1], [1, 2], [1], [1]], ["`relabel`", "numbers"]),
        (numpy.True_, ["`relabel`", "True"]),
        ("cat", ["`relabel`", "'cat'"]),
        (True, ["`relabel`", "True"]),
        ([0, 1, 2], ["`relabel`", "3 targets", "4 examples"]),
        (lambda batch: None, ["`relabel`", "None"]),
        (1.5, ["`relabel`", "1.5", "int64[4]"]),
        (torch.tensor([0.0, 0.5, 1.0, 2.0]), ["`relabel`", "float32[4]", "int64[4]", "rounded"]),
    ],
    ids=[
        "few",
        "columns",
        "function",
        "class",
        "negative",
        "strings",
        "ragged",
        "numpy bool",
        "string",
        "bool",
        "list",
        "none",
        "float",
        "floats",
    ],
)
def test_new_targets_that_do_not_fit_are_refused(relabel: Any, words: list[str]) -> None:
    trainer, module, batch = ready()
    with refused(module, BatchError, *words):
        trainer.unlearn(batch, relabel=relabel)


def test_relabelling_a_batch_without_recognisable_targets_is_refused() -> None:
    class Keyed(Normalised):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch["input"]), batch["answer"])

    data = [{"input": x, "answer": y} for x, y in blobs()]
    trainer, module = make_trainer(quick(), max_epochs=1), Keyed()
    trainer.fit(module, loader(data))
    with refused(module, BatchError, "does not show which tensor has the targets", "'answer'", "label"):
        trainer.unlearn({"input": X, "answer": Y}, relabel=1)


# --------------------------------------------------------------------------------------------------------------------
# Edits
# --------------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path) -> tuple[Path, pl.Trainer, pl.LightningModule, UnlearnReport]:
    trainer, module, batch = ready()
    report = trainer.unlearn(batch, step=1.0)
    report.save(tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors", trainer, module, report


@pytest.mark.parametrize("kind", ["garbage", "empty", "truncated", "flipped header", "a model's file"])
def test_files_that_are_not_edits_are_refused(tmp_path: Path, kind: str) -> None:
    path, _, module, _ = saved(tmp_path)
    content = path.read_bytes()
    if kind == "a model's file":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(
            {
                "garbage": random.Random(0).randbytes(500),
                "empty": b"",
                "truncated": content[:-7],
                "flipped header": content[:8] + b"[" + content[9:],
            }[kind]
        )
    with refused(module, EditError, "edit.safetensors", "edit file"):
        UnlearnReport.load(path, module)


@pytest.mark.parametrize("missing", ["new/net.0.weight", "indices/net.0.weight"])
def test_an_edit_file_with_a_missing_part_is_refused(tmp_path: Path, missing: str) -> None:
    from safetensors import safe_open

    path, _, module, _ = saved(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    del tensors[missing]
    metadata["digest"] = digest(tensors, json.loads(metadata["report"]))
    save_file(tensors, path, metadata=metadata)
    with refused(module, EditError, "'net.0.weight'", "incomplete"):
        UnlearnReport.load(path, module)


def test_a_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        UnlearnReport.load(tmp_path / "none.safetensors")


def test_an_edit_of_another_model_is_refused(tmp_path: Path) -> None:
    path, _, module, report = saved(tmp_path)
    renamed, wider = Classifier(nn.Sequential(nn.Identity(), nn.Linear(6, 3))), Normalised()
    wider.net[0], wider.net[1] = nn.Linear(6, 9), nn.BatchNorm1d(9)
    doubled = Normalised().double()
    for other, words in (
        (renamed, ["'net.0.weight'", "does not have", "another model"]),
        (wider, ["'net.0.weight'", "(8, 6)", "(9, 6)", "another model"]),
        (doubled, ["float32", "float64", "another model"]),
    ):
        with refused(other, EditError, *words):
            UnlearnReport.load(path, other)
        for call in (report.undo, report.apply):
            with refused(other, EditError, *words):
                call(other)
    loaded = UnlearnReport.load(path)
    with refused(module, EditError, "loaded from a file", "undo(model)"):
        loaded.undo()
    same_shape = Normalised()
    with refused(same_shape, EditError, "have changed", "load the weights"):
        loaded.apply(same_shape)


def test_a_second_undo_or_apply_is_refused(tmp_path: Path) -> None:
    _, _, module, report = saved(tmp_path)
    with refused(module, EditError, "Cannot apply", "in the weights already"):
        report.apply()
    report.undo()
    with refused(module, EditError, "Cannot undo", "not in the weights"):
        report.undo()


def test_undo_after_the_weights_have_changed_is_refused(tmp_path: Path) -> None:
    _, trainer, module, report = saved(tmp_path)
    with torch.no_grad():
        module.net[0].weight[0, 0] += 1
    with refused(module, EditError, "Cannot undo", "changed since", "load the weights"):
        report.undo()
    with torch.no_grad():
        module.net[3].weight += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        later = trainer.unlearn((X[:2], Y[:2]), step=1.0)
    later.undo()
    with refused(module, EditError, "Undo later edits first"):
        report.undo()
