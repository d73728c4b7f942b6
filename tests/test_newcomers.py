"""First uses of the package that follow the documentation only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gif import SOLVERS, ConfigurationError, GIFMixin
from lightning_gif.solvers import Solution, lsmr

from .conftest import Classifier, batch_of, fitted


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
