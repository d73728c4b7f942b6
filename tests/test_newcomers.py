"""First uses of the package that follow the documentation only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import SOLVERS, ConfigurationError, ConvergenceWarning, GIFCallback, GIFMixin, GIFWarning
from lightning_gif.reporting.previews import _split
from lightning_gif.solvers import Solution, lsmr

from .conftest import Classifier, batch_of, fitted, loader


def test_groups_by_a_function_that_returns_tensors_are_groups_of_their_values() -> None:
    trainer, _, dataset = fitted()
    report = trainer.influence(batch_of(dataset, [0, 1]))
    by_tensor = report.by_group(lambda item: item[1])
    by_value = report.by_group(lambda item: int(item[1]))
    assert len(by_tensor.names) == 3
    assert by_tensor.names == by_value.names
    assert torch.equal(by_tensor.totals, by_value.totals)
    halves = report.by_group(lambda item: item[0].mean() > 0.0)
    assert set(halves.names) == {True, False}
    assert sum(halves.counts.tolist()) == len(dataset)


class Margin(GIFMixin, Classifier):
    def influence_measurement(self, batch: Any) -> Tensor:
        x, y = batch
        return self(x).gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize(("module", "measured"), [(Classifier, "loss"), (Margin, "measurement")])
def test_a_report_names_the_measurement_of_its_scores(module: type[Classifier], measured: str) -> None:
    trainer, _, dataset = fitted(module())
    report = trainer.influence(batch_of(dataset, [0, 1]))
    assert f"predicted change of the query's {measured} if" in str(report)


@pytest.fixture
def registered() -> Any:
    names = list[str]()

    def register(name: str, function: Any) -> None:
        SOLVERS.register(name)(function)
        names.append(name)

    yield register
    for name in names:
        SOLVERS._items.pop(name)


def test_a_function_as_a_solver_gets_one_right_hand_side_at_a_time(registered: Any) -> None:
    seen: list[tuple[int, ...]] = []

    def mine(operator: Any, rhs: Tensor, **options: Any) -> Solution | list[Solution]:
        seen.append(tuple(rhs.shape))
        return lsmr(operator, rhs, **options)

    registered("mine", mine)
    trainer, _, dataset = fitted()
    query = batch_of(dataset, range(4))
    options: dict[str, Any] = {"per_example": True, "max_iter": 6, "double": True}
    own = trainer.influence(query, solver="mine", **options)
    assert seen
    assert all(len(shape) == 1 for shape in seen)
    torch.testing.assert_close(own.scores, trainer.influence(query, solver="lsmr", **options).scores)


def test_a_solver_that_returns_a_tensor_raises_with_a_remedy(registered: Any) -> None:
    registered("careless", lambda operator, rhs, **options: torch.zeros(operator.shape[1]))
    trainer, _, dataset = fitted()
    with pytest.raises(ConfigurationError, match=r"'careless' must return a lightning_gif.solvers.Solution.*got list"):
        trainer.influence(batch_of(dataset, [0]), solver="careless")


class Adam(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def test_a_sketch_that_is_worse_than_zero_warns() -> None:
    """A rank of 20 is too small for one query here; without `rtol` other solves end silently."""
    torch.manual_seed(0)
    x = torch.randn(300, 10)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    module = Adam(torch.nn.Sequential(torch.nn.Linear(10, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3)))
    trainer, _, _ = fitted(module, TensorDataset(x, y), GIFCallback(), max_epochs=15)
    with pytest.warns(ConvergenceWarning, match="rank of the sketch is too small"):
        report = trainer.influence((x[:5] + 0.3, y[:5]), solver="nystrom")
    assert report.solution.residual >= 1


def test_that_no_targets_can_be_picked_is_said_once_in_a_fit() -> None:
    x = torch.randn(40, 5)
    module = Classifier(torch.nn.Linear(5, 3))
    with pytest.warns(GIFWarning, match="once in a fit") as caught:
        trainer, _, _ = fitted(
            module, TensorDataset(x, torch.arange(40) % 3), callback=GIFCallback(ratio=0.01), max_epochs=5
        )
    assert len([one for one in caught if "No targets were picked" in str(one.message)]) == 1
    assert trainer.influence((x[:1], torch.zeros(1, dtype=torch.long)), unconverged="ignore").n_train == 40


@pytest.mark.slow
def test_an_edit_that_raises_the_loss_of_unseen_examples_warns() -> None:
    """Wrong labels are removed from a net whose training was stopped early, so that the default goes too far."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(4, 20, generator=generator)

    def made(count: int) -> TensorDataset:
        y = torch.randint(0, 4, (count,), generator=generator)
        return TensorDataset(centres[y] * 0.9 + torch.randn(count, 20, generator=generator), y)

    train, unseen = made(600), made(300)
    wrong = torch.randperm(600, generator=generator)[:40]
    train.tensors[1][wrong] = (train.tensors[1][wrong] + 1) % 4
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    trainer, _, _ = fitted(Adam(net), train, max_epochs=5)
    with pytest.warns(GIFWarning, match=r"loss of the unseen examples rose from .* step='natural'"):
        report = trainer.unlearn(wrong.tolist(), unseen=loader(unseen), dry_run=True, step="relinearise")
    assert report.unseen.after > 1.1 * report.unseen.before
    milder = trainer.unlearn(wrong.tolist(), unseen=loader(unseen), dry_run=True, step="natural")
    assert milder.unseen.after < report.unseen.after


def test_what_follows_the_label_in_an_item_is_not_the_label() -> None:
    assert _split((1.0, 3, "file.png")) == ([1.0, "file.png"], 3)
    assert _split((1.0, 3, {"name": "file.png"})) == ([1.0, {"name": "file.png"}], 3)
    assert _split(("a text", 3)) == ("a text", 3)
    assert _split(("a question", "an answer")) == ("a question", "an answer")
