"""The unlearning baselines of the benchmarks follow their papers on modules of any kind, without side effects."""

from __future__ import annotations

import copy
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from .conftest import Classifier, blobs, fitted, make_trainer, same_weights, weights

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import baselines
from baselines import BASELINES, Baseline, default, tuned

ALL = pytest.mark.parametrize("name", BASELINES)
SGD = {"optimizer": "sgd", "momentum": 0.0}


class Norms(nn.Module):
    """A module with BatchNorm and dropout, which methods can easily mishandle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Counting(Classifier):
    """Records the batches and their contents."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return super().training_step(batch, batch_idx)


def split(dataset: TensorDataset, label: int = 0, size: int = 8) -> tuple[DataLoader[Any], DataLoader[Any]]:
    members = dataset.tensors[1] == label
    forget, retain = (Subset(dataset, mask.nonzero().flatten().tolist()) for mask in (members, ~members))
    return DataLoader(forget, size), DataLoader(retain, size)


def accuracy(module: Any, dataset: TensorDataset, mask: Tensor) -> float:
    x, y = (tensor[mask] for tensor in dataset.tensors)
    with torch.no_grad():
        return float((module.eval()(x).argmax(1) == y).double().mean())


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, TensorDataset]:
    _, module, dataset = fitted(Counting(net=Norms()), max_epochs=20)
    return module, dataset


# --------------------------------------------------------------------------------------------------------------------
# All baselines
# --------------------------------------------------------------------------------------------------------------------


@ALL
def test_changes_the_weights_and_nothing_else(name: str, trained: tuple[Classifier, TensorDataset]) -> None:
    module, dataset = copy.deepcopy(trained[0]), trained[1]
    module.train()
    module.net.layers[3].eval()
    flags = [submodule.training for submodule in module.modules()]
    before, attributes = weights(module), vars(module).keys()
    state, numbers = torch.get_rng_state(), (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    with torch.no_grad():
        BASELINES[name].function(module, *split(dataset), seed=0, steps=6, **BASELINES[name].grid[1])
    assert not same_weights(before, weights(module))
    assert [submodule.training for submodule in module.modules()] == flags
    assert vars(module).keys() == attributes  # the methods that log are restored
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert numbers == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


@ALL
def test_is_a_function_of_the_seed(name: str, trained: tuple[Classifier, TensorDataset]) -> None:
    module, dataset = trained
    before = weights(module)
    loaders = [DataLoader(loader.dataset, 8, shuffle=True) for loader in split(dataset)]
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(found))
        found.append(weights(default(BASELINES[name], module, *loaders, seed, steps=5).module))
    assert same_weights(found[0], found[1])
    assert not same_weights(found[0], found[2])
    assert same_weights(before, weights(module))


@ALL
@pytest.mark.parametrize("steps", [4, 7])
def test_takes_no_more_steps_than_given(name: str, steps: int, trained: tuple[Classifier, TensorDataset]) -> None:
    module, dataset = copy.deepcopy(trained[0]), trained[1]
    module.seen.clear()
    BASELINES[name].function(module, *split(dataset), seed=0, steps=steps, **BASELINES[name].published)
    assert steps - 1 <= len(module.seen) <= steps  # NegGrad+ takes two batches at a time


@ALL
def test_takes_no_more_time_than_given(name: str, trained: tuple[Classifier, TensorDataset]) -> None:
    hyperparameters = {key: 1e6 if key == "epochs" else value for key, value in BASELINES[name].published.items()}
    module, dataset = copy.deepcopy(trained[0]), trained[1]
    outcome = default(Baseline(BASELINES[name].function, hyperparameters, []), module, *split(dataset), 0, seconds=0.1)
    assert outcome.seconds < 2


@ALL
def test_takes_batches_of_any_structure_and_samplers(name: str) -> None:
    class Mapped(Classifier):
        def training_step(self, batch: Any) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(self(batch["x"]), batch["label"])}

    module, dataset = Mapped(), blobs()
    items = [{"x": x, "label": int(y)} for x, y in dataset]
    members = [i for i, item in enumerate(items) if item["label"] == 0]
    forget = DataLoader(items, 8, sampler=SubsetRandomSampler(members))
    retain = DataLoader(Subset(items, [i for i in range(len(items)) if i not in members]), 8)
    before = weights(module)
    BASELINES[name].function(module, forget, retain, seed=0, steps=8, **BASELINES[name].grid[1])
    assert all(torch.isfinite(value).all() for value in weights(module).values())
    assert name == "ssd" or not same_weights(before, weights(module))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "tensor") for name in ("fine_tune", "neg_grad_plus", "l1_sparse", "salun")),
        *(("salun", form) for form in ("class", "function")),
    ],
)
def test_corrected_labels_are_learnt(name: str, form: str) -> None:
    _, module, dataset = fitted(max_epochs=20)
    members = dataset.tensors[1] == 0
    relabel = {"tensor": torch.ones(int(members.sum()), dtype=torch.long), "class": 1, "function": lambda b: b[1] + 1}
    hyperparameters = {**BASELINES[name].published, "lr": 0.1, "epochs": 20}
    BASELINES[name].function(module, *split(dataset), seed=0, relabel=relabel[form], **hyperparameters)
    corrected = TensorDataset(dataset.tensors[0], dataset.tensors[1].clamp(min=1))
    assert accuracy(module, corrected, torch.ones_like(members)) > 0.95


def test_manual_optimisation_is_refused(trained: tuple[Classifier, TensorDataset]) -> None:
    module = copy.deepcopy(trained[0])
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="uses manual optimization"):
        default(BASELINES["fine_tune"], module, *split(trained[1]), 0)


# --------------------------------------------------------------------------------------------------------------------
# Each baseline
# --------------------------------------------------------------------------------------------------------------------


def gradients(module: Classifier, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(module.net(x), y), list(module.parameters())))


def of_class(dataset: TensorDataset, label: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    members = dataset.tensors[1] == label
    forget, retain = (tuple(tensor[mask] for tensor in dataset.tensors) for mask in (members, ~members))
    return forget, retain


@pytest.mark.parametrize(
    ("name", "hyperparameters", "of_retain", "of_forget"),
    [
        ("fine_tune", {}, 1.0, 0.0),
        ("gradient_ascent", {}, 0.0, -1.0),
        ("neg_grad_plus", {"alpha": 0.95}, 0.95, -0.05),
    ],
)
def test_a_step_over_all_data_is_the_one_of_the_formula(
    name: str, hyperparameters: dict[str, float], of_retain: float, of_forget: float
) -> None:
    module, dataset = Classifier(), blobs()
    forget, retain = of_class(dataset)
    pairs = zip(module.parameters(), gradients(module, *retain), gradients(module, *forget), strict=True)
    expected = [(w - 0.1 * (of_retain * r + of_forget * f)).detach() for w, r, f in pairs]
    BASELINES[name].function(module, *split(dataset, size=99), seed=0, epochs=1, lr=0.1, **SGD, **hyperparameters)
    torch.testing.assert_close([w.detach() for w in module.parameters()], expected)


def test_l1_penalty_decreases_from_what_is_given_to_zero() -> None:
    module, dataset = Classifier(), blobs()
    for weight in module.parameters():
        weight.data = weight.data.sign() + weight.data  # far from zero, the penalty has a constant gradient
    plain, before = copy.deepcopy(module), [weight.detach().clone() for weight in module.parameters()]
    loaders = split(dataset, size=99)
    tiny = {"epochs": 4, "lr": 1e-6, **SGD}
    baselines.fine_tune(plain, *loaders, seed=0, **tiny)
    baselines.l1_sparse(module, *loaders, seed=0, penalty=1e3, **tiny)
    for old, without, new in zip(before, plain.parameters(), module.parameters(), strict=True):
        shrunk = 1e-6 * 1e3 * (1 + 0.75 + 0.5 + 0.25) * old.sign()
        torch.testing.assert_close((without - new).detach(), shrunk, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("examples", [1, None])
def test_ssd_dampens_by_the_ratio_of_importances(examples: int | None) -> None:
    _, module, dataset = fitted(max_epochs=5)

    def importance(x: Tensor, y: Tensor) -> list[Tensor]:
        batches = zip(x.split(examples or len(x)), y.split(examples or len(x)), strict=True)
        squares = [[slope.square() for slope in gradients(module, *batch)] for batch in batches]
        return [torch.stack(each).mean(0) for each in zip(*squares, strict=True)]

    pairs = zip(module.parameters(), importance(*of_class(dataset)[0]), importance(*dataset.tensors), strict=True)
    expected = []
    for weight, here, everywhere in pairs:
        factor = torch.where(here > 1.5 * everywhere, (0.9 * everywhere / here).clamp(max=1), torch.ones(()))
        expected.append((weight * factor).detach())
    before = weights(module)
    baselines.ssd(module, *split(dataset, size=99), seed=0, alpha=1.5, dampening=0.9, examples=examples)
    assert not same_weights(before, weights(module))
    torch.testing.assert_close([weight.detach() for weight in module.parameters()], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_salun_changes_the_salient_share_alone(optimizer: str) -> None:
    module, dataset = Classifier(), blobs()
    slopes = torch.cat([slope.abs().flatten() for slope in gradients(module, *of_class(dataset)[0])])
    salient = torch.zeros_like(slopes, dtype=torch.bool)
    salient[slopes.topk(round(len(slopes) / 4)).indices] = True
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    settings = {"epochs": 3, "lr": 0.1, "weight_decay": 0.1, "optimizer": optimizer}
    baselines.salun(module, *split(dataset), seed=0, saliency=0.25, **settings)
    changed = nn.utils.parameters_to_vector(module.parameters()).detach() != before
    assert torch.equal(changed, salient)


def test_salun_draws_labels_among_the_other_classes() -> None:
    module, dataset = Counting(), blobs()
    forget, retain = split(dataset)
    baselines.salun(module, forget, retain, seed=0, **BASELINES["salun"].published)
    truth = {tuple(x.tolist()): int(y) for x, y in dataset}
    passed = module.seen[len(forget) :]  # the first ones compute the saliency
    pairs = [(truth[tuple(x.tolist())], int(y)) for xs, ys in passed for x, y in zip(xs, ys, strict=True)]
    assert {given for true, given in pairs if true == 0} == {1, 2}
    assert all(given == true for true, given in pairs if true != 0)


def test_salun_needs_classes() -> None:
    class Regressor(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self(batch[0])[:, 0], batch[1])

    data = TensorDataset(torch.randn(16, 6), torch.randn(16))
    loaders = DataLoader(Subset(data, range(4)), 4), DataLoader(Subset(data, range(4, 16)), 4)
    with pytest.raises(ValueError, match="need targets that are class labels"):
        default(BASELINES["salun"], Regressor(), *loaders, 0)
    for name in BASELINES.keys() - {"salun"}:
        default(BASELINES[name], Regressor(), *loaders, 0, steps=4)
    baselines.salun(Regressor(), *loaders, seed=0, relabel=torch.zeros(4), **BASELINES["salun"].published)


class Convolutions(nn.Sequential):
    """A net for vectors of six, seen as images of 2 × 3."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)),
        )


def test_msg_resets_the_weights_of_convolutions_with_the_smallest_gradients() -> None:
    """Without a learning rate, the new values remain. The gradient is of the retained minus the forget loss."""
    module, dataset = Classifier(net=Convolutions()), blobs()
    members = (dataset.tensors[1] == 0).nonzero().flatten().tolist()
    others = [i for i in range(len(dataset)) if i not in members][: len(members)]  # one batch of each
    forget, retain = (DataLoader(Subset(dataset, rows), 99) for rows in (members, others))
    x, y = dataset.tensors
    pairs = zip(gradients(module, x[others], y[others]), gradients(module, x[members], y[members]), strict=True)
    before, slopes = weights(module), [kept - gone for kept, gone in pairs]
    settings = {"reset": 0.25, "old_rate": 0.1, "epochs": 1, "lr": 0.0, **SGD}
    baselines.masked_small_gradients(module, forget, retain, seed=0, **settings)
    for (name, new), slope in zip(module.named_parameters(), slopes, strict=True):
        changed = new.detach() != before[name]
        if new.ndim < 4:
            assert not changed.any(), name
            continue
        assert int(changed.sum()) == round(0.25 * new.numel())
        assert slope[changed].abs().max() <= slope[~changed].abs().min()


def test_msg_multiplies_the_gradients_of_weights_that_it_kept() -> None:
    """A net without convolutions has its linear layers reset. With ``old_rate=0``, no other weight of them changes."""
    module, dataset = Classifier(), blobs()
    before = weights(module)
    settings = {"reset": 0.2, "old_rate": 0.0, "epochs": 9, "lr": 0.1, **SGD}
    baselines.masked_small_gradients(module, *split(dataset), seed=0, **settings)
    for name, new in weights(module).items():
        share = (new != before[name]).double().mean()
        assert float(share) == pytest.approx(0.2, abs=0.02) if new.ndim > 1 else share > 0.9, name


def test_ct_transposes_square_kernels() -> None:
    module, dataset = Classifier(net=Convolutions()), blobs()
    before = weights(module)
    baselines.convolution_transpose(module, *split(dataset), seed=0, epochs=1, lr=0.0, **SGD)
    for name, new in weights(module).items():
        old = before[name]
        assert torch.equal(new, old.mT if new.ndim == 4 and new.shape[2] == new.shape[3] else old), name
    with pytest.raises(ValueError, match="no convolution with a square kernel"):
        baselines.convolution_transpose(Classifier(), *split(dataset), seed=0, epochs=1, lr=0.0, **SGD)


@pytest.mark.parametrize("name", ["masked_small_gradients", "convolution_transpose"])
def test_methods_of_the_competition_learn_the_retained_examples_again(name: str) -> None:
    module, dataset = Classifier(net=Convolutions()), blobs()
    own = {"reset": 0.3, "old_rate": 0.1} if name == "masked_small_gradients" else {}
    getattr(baselines, name)(module, *split(dataset), seed=0, epochs=40, lr=0.05, optimizer="sgd", **own)
    assert accuracy(module, dataset, dataset.tensors[1] != 0) > 0.95


@ALL
def test_running_statistics_move_with_mixed_batches_only(name: str, trained: tuple[Classifier, TensorDataset]) -> None:
    outcome = default(BASELINES[name], trained[0], *split(trained[1]), 0, steps=6)
    moved = not torch.equal(outcome.module.net.layers[1].running_mean, trained[0].net.layers[1].running_mean)
    assert moved == (name in ("fine_tune", "l1_sparse", "salun"))


# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


def test_all_have_the_same_tuning_budget() -> None:
    assert len({len(baseline.grid) for baseline in BASELINES.values()}) == 1
    for baseline in BASELINES.values():
        assert baseline.grid[0] == baseline.published
        assert all(one != other for i, one in enumerate(baseline.grid) for other in baseline.grid[:i])


@ALL
def test_every_setting_runs(name: str, trained: tuple[Classifier, TensorDataset]) -> None:
    module, dataset = trained
    outcome = tuned(BASELINES[name], module, *split(dataset), lambda changed: 0.0, 0, steps=3)
    assert [trial.hyperparameters for trial in outcome.trials] == BASELINES[name].grid
    assert outcome.chosen is outcome.trials[0]
    assert outcome.seconds >= sum(trial.seconds for trial in outcome.trials)


def test_the_best_score_is_chosen_and_nan_is_worst(trained: tuple[Classifier, TensorDataset]) -> None:
    scores = iter([math.nan, 1.0, math.nan, 3.0, 2.0, 3.0])
    given: list[Any] = []

    def score(changed: Any) -> float:
        given.append(changed)
        return next(scores)

    outcome = tuned(BASELINES["gradient_ascent"], trained[0], *split(trained[1]), score, 0, steps=2)
    assert outcome.module is given[3]
    assert outcome.chosen is outcome.trials[3]
    assert outcome.chosen.score == 3.0


@pytest.mark.slow
def test_each_forgets_a_digit_at_one_of_its_settings() -> None:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    from digits import DigitsModel, digits

    train, _ = digits()
    module = DigitsModel()
    make_trainer(max_epochs=10).fit(module, DataLoader(train, 64, shuffle=True))
    gone = train.tensors[1] == 3
    loaders = split(train, 3, size=64)

    def score(changed: Any) -> float:
        return accuracy(changed, train, ~gone) - accuracy(changed, train, gone)

    for name, setting in {"fine_tune": 2, "neg_grad_plus": 4, "l1_sparse": 2, "salun": 0}.items():
        only = Baseline(BASELINES[name].function, BASELINES[name].grid[setting], [])
        assert score(default(only, module, *loaders, 0).module) > 0.9, name
    for name, least in {"gradient_ascent": 0.5, "ssd": 0.8}.items():
        assert tuned(BASELINES[name], module, *loaders, score, 0).chosen.score > least, name


@pytest.mark.slow
def test_an_edit_and_baselines_are_compared_on_a_module_given_by_its_import_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    import compare
    from digits import DigitsModel

    torch.save({"state_dict": DigitsModel().state_dict()}, tmp_path / "other.ckpt")
    arguments = ["--model", "digits.DigitsModel", "--data", "digits.DigitsData", "--forget_class", "3"]
    arguments += ["--trainer.max_epochs", "4", "--trainer.accelerator", "cpu", "--baselines", '["ssd"]']
    arguments += [f"--trainer.{name}" + "=false" for name in ("enable_progress_bar", "enable_model_summary")]
    compare.main([*arguments, "--retrained", str(tmp_path / "other.ckpt")])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    columns, rows = lines[0], {line[0]: line for line in lines[2:]}
    assert list(rows) == ["before", "retrained", "edit", "ssd, default", "ssd, tuned"]
    value = {name: dict(zip(["", *columns], row, strict=False)) for name, row in rows.items()}
    assert float(value["before"]["forget accuracy (%)"]) > 80
    assert float(value["edit"]["forget accuracy (%)"]) < 2
    assert float(value["edit"]["retain accuracy (%)"]) > float(value["before"]["retain accuracy (%)"]) - 3
    assert float(value["retrained"]["retain accuracy (%)"]) < 60  # it is untrained
    assert float(value["edit"]["gap to retraining (points)"]) > 20
    with pytest.raises(SystemExit, match="either --forget_class or --forget"):
        compare.main([*arguments, "--forget", "[1]"])
