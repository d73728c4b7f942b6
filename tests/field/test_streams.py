"""An IterableDataset whose rows have ids can be scored; an edit is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_gif import GIFCallback, GIFWarning, TrainingDataError

from ..conftest import make_trainer
from .reference import CONVERGED, Module, cross_entropy, dense_scores, error

N = 24
X, Y = torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3
IDS = [1000 - 7 * i for i in range(N)]


class Rows(IterableDataset[Any]):
    """Rows with ids in descending order. It counts the rows that were read."""

    name = "id"

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for index, x, y in zip(IDS, X, Y, strict=True):
            self.read += 1
            yield {"x": x, "y": y, self.name: self.wrap(index)}

    def wrap(self, index: int) -> Any:
        return index


class Tensors(Rows):
    name = "idx"

    def wrap(self, index: int) -> Any:
        return torch.tensor([index])


class WithoutIds(Rows):
    name = "when"


class Named(Rows):
    def wrap(self, index: int) -> Any:
        return str(index)


class Endless(Rows):
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(super().__iter__())


class Shuffled(Rows):
    def __iter__(self) -> Iterator[Any]:
        rows = list(super().__iter__())
        self.read += 1
        return iter(rows[self.read % N :] + rows[: self.read % N])


class Net(Module):
    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


QUERY = {"x": X[:4], "y": Y[:4], "id": torch.arange(4)}


def trained(rows: Rows, **options: Any) -> Any:
    trainer = make_trainer(GIFCallback(ratio=0.5, snapshots=0, **options), max_epochs=3, limit_train_batches=3)
    trainer.fit(Net(), DataLoader(rows, 8))
    return trainer


@pytest.mark.parametrize("rows", [Rows, Tensors])
def test_scores_are_those_of_the_rows_by_id(rows: type[Rows]) -> None:
    trainer = trained(rows())
    query = {**QUERY, rows.name: QUERY["id"] if rows is Rows else QUERY["id"][:, None]}
    report = trainer.influence(
        {name: value for name, value in query.items() if name in ("x", "y", rows.name)}, **CONVERGED
    )
    assert report.indices.tolist() == IDS
    assert "each example is given by the id of its row" in str(report)
    pairs = list(zip(X.double(), Y, strict=True))
    exact = dense_scores(trainer.lightning_module, lambda m, x: m.net(x[None]), cross_entropy, pairs, range(4))
    assert error(report.scores[0], exact) < 1e-5
    assert report.shown(IDS[5]).label is not None or report.dataset[IDS[5]]["y"] == Y[5]


def test_few_passes_are_made() -> None:
    rows = Rows()
    trainer = trained(rows)
    before = rows.read
    trainer.influence(QUERY)
    # The ids, a look for random values, the probe of the losses, the curvature, the scores, and what is shown.
    assert rows.read - before <= 8 * N


def test_chosen_rows_and_self_influence() -> None:
    trainer = trained(Rows())
    assert trainer.influence(QUERY, among=[IDS[3], IDS[1]]).indices.tolist() == [IDS[3], IDS[1]]
    assert trainer.self_influence().indices.tolist() == IDS


def test_an_edit_is_refused_and_the_named_remedy_works() -> None:
    trainer = trained(Rows())
    with pytest.raises(
        TrainingDataError,
        match=r"An edit reads.*map-style dataset as `dataloader=`, and give examples by their positions",
    ):
        trainer.unlearn([IDS[3]])
    rows = list(Rows())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        report = trainer.unlearn([3], dataloader=DataLoader(rows, 8), step="natural")  # type: ignore[arg-type]
    report.undo()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (WithoutIds, r"rows have no whole number as id, so.*yield mappings with a whole number as one of 'id'"),
        (Named, r"no whole number as id \(got \{'id': 'str'\}\)"),
        (Endless, r"Two rows of Endless have the id 1000"),
        (Shuffled, r"different order in each pass"),
    ],
)
def test_rows_without_stable_ids_are_refused(rows: type[Rows], message: str) -> None:
    trainer = trained(rows())
    with pytest.raises(TrainingDataError, match=message):
        trainer.influence(QUERY)
