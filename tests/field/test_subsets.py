"""Dataset indices where the training loader draws from a Subset: one numbering, with the other beside it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

from lightning_gif import ConfigurationError, GIFCallback, GIFWarning, InfluenceReport, UnlearnReport
from lightning_gif.storage.audit_log import read

from ..conftest import make_trainer
from .reference import Module

N = 40
WHOLE = TensorDataset(torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) % 3)


class Net(Module):
    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


def split() -> Subset[Any]:
    return random_split(WHOLE, [30, 10], torch.Generator().manual_seed(1))[0]


def nested() -> Subset[Any]:
    return Subset(Subset(WHOLE, range(39, -1, -1)), range(5, 35))


def trained(data: Dataset[Any]) -> Any:
    trainer = make_trainer(GIFCallback(ratio=0.5), max_epochs=2)
    trainer.fit(Net(), DataLoader(data, 8))
    return trainer


@pytest.mark.parametrize("view", [split, nested])
def test_a_report_has_both_indices(view: Any) -> None:
    data = view()
    report = trained(data).influence(DataLoader(Subset(WHOLE, [3]), 1))
    assert report.indices.tolist() == list(range(30))
    below = report.innermost_indices()
    for index, inner in zip(report.indices.tolist(), below.tolist(), strict=True):
        assert torch.equal(data[index][0], WHOLE[inner][0])
    best = int(report.proponents(1).indices[0, 0])
    assert f"proponents: {best} [{int(below[best])}]" in str(report)
    assert "index in the training Subset [and in the dataset below it]" in str(report)


def test_a_table_has_both_indices(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    data = split()
    report = trained(data).influence([WHOLE[3][0][None], WHOLE[3][1][None]])
    table = report.to_dataframe()
    assert table["innermost_index"].tolist() == [data.indices[index] for index in table["index"]]
    report.save(tmp_path / "report")
    alone = InfluenceReport.load(tmp_path / "report")  # without its dataset, the other indices are not known
    assert "innermost_index" not in alone.to_dataframe()
    assert alone.innermost_indices() is None


def test_an_edit_and_its_record_have_both_indices(tmp_path: Path) -> None:
    data = split()
    trainer, log = trained(data), tmp_path / "log.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        report = trainer.unlearn([3, 7], record=log, step="natural")
    expected = [data.indices[3], data.indices[7]]
    assert report.data["indices"] == [3, 7]
    assert report.data["innermost_indices"] == expected
    assert any(f"3 is {expected[0]} there" in note for note in report.notes)
    assert read(log).entries[0]["asked"]["innermost_indices"] == expected
    report.save(tmp_path / "edit")
    assert UnlearnReport.load(tmp_path / "edit").data["innermost_indices"] == expected


def test_the_dataset_below_a_subset_is_refused_for_a_stored_report(tmp_path: Path) -> None:
    data = split()
    trained(data).influence([WHOLE[3][0][None], WHOLE[3][1][None]]).save(tmp_path / "report")
    assert InfluenceReport.load(tmp_path / "report", data).innermost_indices() is not None
    with pytest.raises(ConfigurationError, match="give the Subset and not the dataset below it"):
        InfluenceReport.load(tmp_path / "report", WHOLE)


def test_without_a_subset_there_is_one_numbering(tmp_path: Path) -> None:
    trainer = trained(WHOLE)
    report = trainer.influence([WHOLE[3][0][None], WHOLE[3][1][None]])
    assert report.innermost_indices() is None
    assert "Subset" not in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GIFWarning)
        edit = trainer.unlearn([3], dry_run=True, step="natural")
    assert edit.data["innermost_indices"] is None
    assert not any("Subset" in note for note in edit.notes)
