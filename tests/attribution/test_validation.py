"""The test of scores by retraining: its statistics, its sign, and that it leaves everything else as it was."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_gif import ConfigurationError, GIFCallback, NonFiniteError, ValidationReport, attach
from lightning_gif.attribution.lds import bootstrap_interval, noise_ceiling, spearman

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer, same_weights, weights
from ..reports import csv_values

DECAY = 0.02


class Ridge(pl.LightningModule):
    """A linear regression in float64, with the weight decay ``DECAY``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1, bias=False, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x)[:, 0], y)


def points(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, 4), (n,)))
    return TensorDataset(x, x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64) + 0.5 * noise)


TRAIN, QUERY = points(60, 0), points(8, 1).tensors


class Solve:
    """Fits a ridge regression in closed form, and counts how often.

    Args:
        stop_after: Raises a ``KeyboardInterrupt`` instead of the fit after this number of fits.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self.calls: list[tuple[list[int], int]] = []
        self._stop_after = stop_after

    def __call__(self, indices: list[int], seed: int) -> Ridge:
        if len(self.calls) == self._stop_after:
            raise KeyboardInterrupt
        self.calls.append((indices, seed))
        module, (x, y) = Ridge(), batch_of(TRAIN, indices)
        curvature = 2 * x.mT @ x / len(x) + DECAY * torch.eye(4, dtype=torch.float64)
        module.net.weight.data[:] = torch.linalg.solve(curvature, 2 * x.mT @ y / len(x))
        return module


def ridge(data: Any = TRAIN, **options: Any) -> pl.Trainer:
    """A trainer with the ridge regression of all training examples. Its scores are exact influence functions."""
    trainer = make_trainer()
    callback = GIFCallback(weight_decay=DECAY, damping=0.0, solver="dense", **options)
    attach(trainer, Solve()(list(range(60)), 0), train_dataloaders=loader(data), callback=callback)
    return trainer


def refit(indices: list[int], seed: int) -> Classifier:
    """Trains a classifier of the blobs with a trainer of its own."""
    module = Classifier()
    make_trainer().fit(module, loader(Subset(blobs(), indices)))
    return module


# --------------------------------------------------------------------------------------------------------------------
# Statistics
# --------------------------------------------------------------------------------------------------------------------


def test_rank_correlations_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(4, (9, 3), generator=generator).double()  # with ties
    other = torch.randn(9, 3, generator=generator)
    expected = [float(spearmanr(one[:, column], other[:, column]).statistic) for column in range(3)]
    torch.testing.assert_close(spearman(one, other), torch.tensor(expected, dtype=torch.float64))
    assert spearman(torch.ones(9, 1), other[:, :1]).item() == 0
    many = torch.randn(2, 5, 9, 3, generator=generator)
    assert torch.equal(spearman(many, other)[1, 4], spearman(many[1, 4], other))


@pytest.mark.parametrize(("subsets", "queries"), [(8, 1), (8, 20), (30, 5)])
def test_an_interval_of_random_scores_holds_zero(subsets: int, queries: int) -> None:
    generator, held = torch.Generator().manual_seed(0), 0
    for draw in range(40):
        predicted, measured = torch.randn(2, subsets, queries, generator=generator)
        low, high = bootstrap_interval(predicted, measured, draws=200, seed=draw)
        held += low <= 0 <= high
    assert held >= 35


def test_an_interval_holds_its_lds_and_gets_narrower_with_more_subsets() -> None:
    widths = []
    for subsets in (8, 32, 128):
        signal, noise = torch.randn(2, subsets, 10, generator=torch.Generator().manual_seed(0))
        measured = signal + 0.7 * noise
        low, high = bootstrap_interval(signal, measured, draws=300)
        assert low <= spearman(signal, measured).mean() <= high
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


def test_the_noise_ceiling_is_the_correlation_of_the_expected_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    expected = torch.randn(4000, 1, 3, generator=generator)
    losses = expected + torch.randn(4000, 3, 3, generator=generator)
    reached = spearman(expected[:, 0], losses.mean(1)).mean()
    assert noise_ceiling(losses) == pytest.approx(float(reached), abs=0.02)
    assert noise_ceiling(expected.expand(-1, 2, -1)) == pytest.approx(1)
    assert noise_ceiling(torch.stack([expected[:, 0], -expected[:, 0]], 1)) == 0
    assert noise_ceiling(expected) is None


# --------------------------------------------------------------------------------------------------------------------
# Scores against retraining
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The losses of eight regressions, which several tests use."""
    folder = tmp_path_factory.mktemp("retrainings")
    ridge().validate_influence(QUERY, Solve(), share=0.9, folder=folder)
    return folder


def test_exact_scores_predict_retraining_and_negated_ones_predict_the_opposite(folder: Path) -> None:
    trainer, never = ridge(), Solve(stop_after=0)
    report = trainer.influence(QUERY, per_example=True)
    found = trainer.validate_influence(QUERY, never, share=0.9, folder=folder, report=report)
    assert found.lds > 0.9
    assert found.interval[0] > 0.7
    assert found.verdict.startswith("Scores predict retraining: LDS 0.9")
    # Both changes are in the unit of the loss, and positive if it is higher without the examples.
    slope = float((found.predicted * found.measured).sum() / found.predicted.square().sum())
    assert 0.8 < slope < 1.4
    negated = dataclasses.replace(report, scores=-report.scores)
    opposite = trainer.validate_influence(QUERY, never, share=0.9, folder=folder, report=negated)
    assert opposite.lds == pytest.approx(-found.lds)
    assert "the opposite of retraining" in opposite.verdict
    drawn = torch.randn(report.scores.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = trainer.validate_influence(
        QUERY, never, share=0.9, folder=folder, report=dataclasses.replace(report, scores=drawn)
    )
    assert noise.interval[0] < 0 < noise.interval[1]
    assert re.search(r"No evidence .* contains 0\. Use more subsets \(n_subsets=16\)", noise.verdict)


def test_changes_are_those_of_the_closed_form(folder: Path) -> None:
    found = ridge().validate_influence(QUERY, Solve(stop_after=0), share=0.9, folder=folder)
    assert found.n_trained == 0
    x, y = QUERY
    for row, losses in zip(found.removed, found.losses, strict=True):
        module = Solve()(found.indices[~row].tolist(), 0)
        torch.testing.assert_close(losses[0], (module.net(x)[:, 0] - y).square().detach())
    assert found.removed.sum(1).tolist() == [6] * 8
    assert len({tuple(row.tolist()) for row in found.removed}) == 8


def test_a_report_of_one_mean_is_tested_on_the_mean_of_the_query() -> None:
    trainer = ridge()
    whole = trainer.validate_influence(QUERY, Solve(), n_subsets=4, share=0.9)
    mean = trainer.validate_influence(QUERY, Solve(), n_subsets=4, share=0.9, report=trainer.influence(QUERY))
    torch.testing.assert_close(mean.losses[..., 0], whole.losses.mean(2))
    torch.testing.assert_close(mean.predicted[:, 0], whole.predicted.mean(1))
    assert mean.correlations.shape == (1,)


def test_the_indices_of_a_subset_are_those_of_the_subset_and_in_the_order_of_a_report() -> None:
    places = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:30].tolist()
    data, solve = Subset(TRAIN, places), Solve()

    def retrain(indices: list[int], seed: int) -> Ridge:
        assert max(indices) < 30
        return solve([places[index] for index in indices], seed)

    trainer = ridge(data)
    trainer.lightning_module.load_state_dict(solve(places, 0).state_dict())
    report = trainer.influence(QUERY, per_example=True)
    found = trainer.validate_influence(QUERY, retrain, n_subsets=4, share=0.9, report=report)
    assert found.indices.tolist() == list(range(30))
    assert found.lds > 0.7
    mixed = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    other = dataclasses.replace(report, scores=report.scores[:, mixed], indices=report.indices[mixed])
    again = trainer.validate_influence(QUERY, retrain, n_subsets=4, share=0.9, report=other)
    torch.testing.assert_close(again.predicted, found.predicted)


@pytest.mark.parametrize("form", ["values", "mapping", "function"])
def test_groups_are_removed_as_a_whole(form: str) -> None:
    names = [index % 6 for index in range(60)]
    groups = {
        "values": names,
        "mapping": dict(enumerate(names)),
        "function": lambda item: names[TRAIN.tensors[0][:, 0].tolist().index(float(item[0][0]))],
    }[form]
    found = ridge().validate_influence(QUERY, Solve(), n_subsets=3, groups=groups)
    by_group = found.removed.view(3, 10, 6)
    assert torch.equal(by_group.all(1), by_group.any(1))
    assert by_group[:, 0].sum(1).tolist() == [3, 3, 3]


def test_a_retrained_model_is_measured_with_its_buffers_and_frozen_parameters() -> None:
    class Partly(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)))
            self.net[0].requires_grad_(False)

    made = []

    def retrain(indices: list[int], seed: int) -> Classifier:
        module = Partly()
        make_trainer(max_epochs=1).fit(module, loader(Subset(blobs(), indices)))
        made.append(module)
        return module

    trainer, module, data = fitted(Partly())
    before, query = weights(module), batch_of(data, range(5))
    found = trainer.validate_influence(query, retrain, n_subsets=3)
    assert same_weights(weights(module), before)
    for one, losses in zip(made, found.losses, strict=True):
        assert not torch.equal(one.net[0].weight, module.net[0].weight)
        expected = F.cross_entropy(one.eval()(query[0]), query[1], reduction="none").double()
        torch.testing.assert_close(losses[0], expected.detach(), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Resuming
# --------------------------------------------------------------------------------------------------------------------


def test_an_interrupted_call_resumes_to_the_same_bits_with_fewer_retrainings(tmp_path: Path) -> None:
    def ask(retrain: Any, **options: Any) -> ValidationReport:
        return ridge().validate_influence(QUERY, retrain, **{"n_subsets": 3, "n_seeds": 2, **options})

    whole = ask(every := Solve())
    with pytest.raises(KeyboardInterrupt):
        ask(Solve(stop_after=4), folder=tmp_path / "losses")
    resumed = ask(rest := Solve(), folder=tmp_path / "losses")
    assert (len(every.calls), len(rest.calls), resumed.n_trained) == (6, 2, 2)
    assert rest.calls == every.calls[4:]
    assert torch.equal(resumed.losses, whole.losses)
    assert resumed.interval == whole.interval
    assert "6 retrainings (4 of an earlier call)" in str(resumed)
    more = ask(another := Solve(), n_subsets=4, folder=tmp_path / "losses")
    assert (len(another.calls), more.n_retrainings) == (2, 8)
    assert torch.equal(more.losses[:3], whole.losses)
    assert torch.equal(more.removed[:3], whole.removed)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"share": 0.8}, "share"),
        ({"seed": 1}, "seed"),
        ({"groups": [index % 6 for index in range(60)]}, "groups"),
        ({"query": points(8, 2).tensors}, "queries"),
        ({"query": points(7, 1).tensors}, "n_queries"),
        ({"weights": True}, "weights"),
        ({"dataloader": DataLoader(points(60, 3))}, "training data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_of_another_call_is_refused(folder: Path, changes: dict[str, Any], what: str) -> None:
    trainer, files = ridge(), {path.name: path.read_bytes() for path in folder.iterdir()}
    options = {"share": 0.9, "query": QUERY, **changes}
    if options.pop("weights", False):
        trainer.lightning_module.net.weight.data += 0.1
    with pytest.raises(ConfigurationError, match=f"another call, which differs in: .*{what}.* delete this one"):
        trainer.validate_influence(options.pop("query"), Solve(stop_after=0), folder=folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_other_files_and_damaged_losses_are_refused(tmp_path: Path) -> None:
    ask = ridge().validate_influence
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="does not hold the losses of an earlier call"):
        ask(QUERY, Solve(stop_after=0), folder=tmp_path)
    with pytest.raises(ConfigurationError, match="is a file"):
        ask(QUERY, Solve(stop_after=0), folder=tmp_path / "notes.txt")
    losses = tmp_path / "losses"
    ask(QUERY, Solve(), n_subsets=3, folder=losses)
    first, second = losses / "subset-000-00.safetensors", losses / "subset-001-00.safetensors"
    first.write_bytes(second.read_bytes())
    with pytest.raises(ConfigurationError, match=r"of another retraining.* Delete it: this retraining is repeated"):
        ask(QUERY, Solve(stop_after=0), n_subsets=3, folder=losses)
    first.unlink()
    assert ask(QUERY, Solve(), n_subsets=3, folder=losses).n_trained == 1


# --------------------------------------------------------------------------------------------------------------------
# What a call leaves as it was
# --------------------------------------------------------------------------------------------------------------------


def test_a_call_changes_nothing_and_logs_one_report(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    trainer, module, data = fitted(logger=logger)
    values, flags, train = weights(module), [one.training for one in module.modules()], trainer.train_dataloader
    states = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    drawn = []

    def retrain(indices: list[int], seed: int) -> Classifier:
        drawn.append((float(torch.rand(())), float(numpy.random.rand()), random.random()))  # noqa: NPY002
        return refit(indices, seed)

    query = batch_of(data, range(6))
    report = trainer.validate_influence(query, retrain, n_subsets=3)
    assert same_weights(weights(module), values)
    assert [one.training for one in module.modules()] == flags
    assert trainer.train_dataloader is train
    assert trainer.lightning_module is module
    assert torch.equal(torch.get_rng_state(), states[0])
    assert numpy.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]
    assert len({one for row in drawn for one in row}) == 9  # each retraining has random numbers of its own
    logged = csv_values(logger)
    assert logged["gif_validation/lds"] == pytest.approx(report.lds)
    assert not any(key.startswith("gif_influence") for key in logged)
    torch.manual_seed(5)
    again = trainer.validate_influence(query, retrain, n_subsets=3)  # also if it does not use its seed
    assert torch.equal(again.losses, report.losses)


def test_a_report_is_saved_loaded_and_printed(tmp_path: Path, folder: Path) -> None:
    report = ridge().validate_influence(QUERY, Solve(stop_after=0), share=0.9, folder=folder)
    report.save(tmp_path / "report")
    loaded = ValidationReport.load(tmp_path / "report")
    assert str(loaded) == str(report)
    assert loaded.summary() == report.summary()
    assert repr(loaded).startswith("ValidationReport(LDS 0.9")
    assert "Scores of 60 training examples for 8 queries, compared with 8 retrainings (8 of an earlier" in str(report)
    assert "noise ceiling unknown (n_seeds=2 or more measures it)" in str(report)
    assert "noise_ceiling" not in report.summary()
    path = tmp_path / "report" / "scores.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ConfigurationError, match="damaged"):
        ValidationReport.load(tmp_path / "report")


# --------------------------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrain": 3}, r"`retrain` must be a function \(indices, seed\).*, got"),
        ({"n_subsets": 2}, "`n_subsets` must be a whole number of at least 3, got 2"),
        ({"n_seeds": 0}, "`n_seeds` must be a whole number of at least 1, got 0"),
        ({"share": 1.0}, "`share` must be a number between 0 and 1, .*, got 1.0. 0.5 keeps half"),
        ({"share": True}, "`share` must be a number between 0 and 1"),
        ({"folder": 3}, "`folder` must be the path of a folder, or None, got 3"),
        ({"groups": [0, 1]}, "`groups` has 2 values, but 60"),
        ({"groups": [0] * 60}, "there is only one"),
        ({"subsets": 9}, "Unknown argument 'subsets'. Did you mean 'n_subsets'"),
        ({"report": "scores"}, "must be a report of trainer.influence"),
    ],
)
def test_invalid_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ridge().validate_influence(QUERY, **{"retrain": Solve(stop_after=0), **options})


def test_a_report_that_does_not_fit_is_refused() -> None:
    trainer, never = ridge(), Solve(stop_after=0)
    for options, message in (
        ({"keep": 10}, "kept only 10 scores"),
        ({"among": [1, 2, 3]}, "scores of 3 training examples, but there are 60"),
    ):
        report = trainer.influence(QUERY, per_example=True, **options)
        with pytest.raises(ConfigurationError, match=message):
            trainer.validate_influence(QUERY, never, report=report)
    report = trainer.influence(points(3, 5).tensors, per_example=True)
    with pytest.raises(ConfigurationError, match="has 3 queries, but the query has 8 examples"):
        trainer.validate_influence(QUERY, never, report=report)
    with pytest.raises(ConfigurationError, match=r"got one of trainer\.self_influence"):
        trainer.validate_influence(QUERY, never, report=trainer.self_influence())
    with pytest.raises(ConfigurationError, match="`snapshots`, `damping` would change"):
        trainer.validate_influence(QUERY, never, report=report, snapshots=True, damping=0.1)


def test_what_retrain_returns_is_checked() -> None:
    trainer, module, data = fitted()
    query = batch_of(data, range(3))

    def ask(retrain: Any) -> None:
        trainer.validate_influence(query, retrain, n_subsets=3)

    def ruin(indices: list[int], seed: int) -> Classifier:
        module.net[0].weight.data += 1
        return Classifier()

    class Diverged(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].weight.data[:] = torch.nan

    with pytest.raises(
        ConfigurationError, match=r"must return the LightningModule that it trained, got None.*new model"
    ):
        ask(lambda indices, seed: None)
    with pytest.raises(ConfigurationError, match=r"`retrain` has trained the original model"):
        ask(lambda indices, seed: module)
    with pytest.raises(ConfigurationError, match=r"1 names. 'net.0.weight' is a parameter of shape \[9, 6\] there"):
        ask(lambda indices, seed: Classifier(_widened(nn.Linear(6, 9, bias=False))))
    with pytest.raises(
        ConfigurationError, match=r"'net\.3\.bias' is a parameter of shape \[3\] there, and no such name"
    ):
        ask(lambda indices, seed: Classifier(nn.Sequential(*copy.deepcopy(module.net), nn.Linear(3, 3))))
    with pytest.raises(NonFiniteError, match=r"3 of 3 values .* the model of subset 0 and seed \d+.* diverged"):
        ask(lambda indices, seed: Diverged())
    with pytest.raises(ConfigurationError, match="Load the weights of the original model from a checkpoint"):
        ask(ruin)


def _widened(first: nn.Linear) -> nn.Sequential:
    net = Classifier().net
    net[0].weight = first.weight
    return net


def test_a_distributed_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ridge()
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(
        ConfigurationError, match=r"the trainer has 2 processes. Use one: .*attach\(Trainer\(devices=1\)"
    ):
        trainer.validate_influence(QUERY, Solve(stop_after=0))
