"""The ends of a ranking do not depend on the blocks in which scores are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

from lightning_gif import ConfigurationError, GIFCallback, InfluenceReport
from lightning_gif.attribution import ranking
from lightning_gif.attribution.ranking import Strongest, strongest

from ..conftest import Classifier, batch_of, blobs, fitted, loader, make_trainer
from ..reports import report_of


def scores_with_ties(queries: int, examples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(examples)
    return torch.randint(-4, 5, (queries, examples), generator=generator).double()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("block", [1, 7, 40, 2**16])
def test_strongest_is_a_stable_sort_for_any_blocks(monkeypatch: pytest.MonkeyPatch, block: int, largest: bool) -> None:
    monkeypatch.setattr(ranking, "_BLOCK", block)
    scores, indices = scores_with_ties(3, 41), torch.randperm(41) + 100
    order = scores.sort(dim=1, descending=largest, stable=True).indices
    for k in (1, 5, 41, 60):
        found = strongest(scores, indices, k, largest=largest)
        assert torch.equal(found.indices, indices[order[:, :k]])
        assert torch.equal(found.scores, scores.gather(1, order[:, :k]))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sizes", [[41], [1] * 41, [3, 20, 18]])
def test_blocks_of_any_size_and_order_give_the_same_ranking(sizes: list[int], backwards: bool) -> None:
    scores, indices = scores_with_ties(2, 41), torch.randperm(41) * 3
    kept, starts = Strongest(2, indices, 6), [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = list(zip(starts, sizes, strict=True))
    for start, size in reversed(blocks) if backwards else blocks:
        kept.write(start, scores[:, start : start + size])
    both, ids = kept.both()
    highest, lowest = (strongest(scores, indices, 6, largest=largest) for largest in (True, False))
    assert torch.equal(ids, torch.cat([highest.indices, lowest.indices.flip(1)], 1))
    assert torch.equal(both, torch.cat([highest.scores, lowest.scores.flip(1)], 1))
    assert bool((both.diff(dim=1) <= 0).all())


def test_the_ranking_is_that_of_a_direct_sort_by_dataset_index() -> None:
    dataset = blobs()
    kept = [5, 40, 3, 22, 11, 17, 30, 8]
    trainer = make_trainer(GIFCallback(ratio=0.5, unconverged="ignore"))
    trainer.fit(Classifier(), loader(Subset(dataset, kept)))
    report = trainer.influence(batch_of(dataset, [0, 1]), per_example=True)
    ids = report.indices.tolist()
    for query, scores in enumerate(report.scores.tolist()):
        ranked = sorted(zip(scores, ids, strict=True), reverse=True)
        assert report.proponents(3).indices[query].tolist() == [index for _, index in ranked[:3]]
        assert report.proponents(3).scores[query].tolist() == [score for score, _ in ranked[:3]]
        assert report.opponents(3).indices[query].tolist() == [index for _, index in ranked[::-1][:3]]
        assert report.opponents(3).scores[query].tolist() == [score for score, _ in ranked[::-1][:3]]
    assert report.scores.shape == (2, 8)


def test_equal_scores_are_ranked_in_order() -> None:
    scores = torch.zeros(1, 500)
    scores[0, 7] = 1.0
    report = report_of(scores)
    assert report.proponents(4).indices[0].tolist() == [107, 100, 101, 102]
    assert report.opponents(3).indices[0].tolist() == [100, 101, 102]


def test_more_than_all_are_all() -> None:
    report = report_of([[0.1, -0.2, 0.3]])
    assert report.proponents().indices.tolist() == [[102, 100, 101]]
    assert report.opponents(50).indices.tolist() == [[101, 100, 102]]


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
def test_a_bad_k_is_refused(k: Any) -> None:
    report = report_of([[0.1, -0.2, 0.3]])
    for ask in (report.proponents, report.opponents, lambda value: report.plot(k=value)):
        with pytest.raises(ConfigurationError, match="`k` must be a whole number of at least 1"):
            ask(k)


def test_a_table_of_all_scores() -> None:
    frame = report_of([[0.1, -0.2], [0.3, 0.4]]).to_dataframe()
    assert list(frame.columns) == ["query", "index", "score", "rank", "kind"]
    assert frame.values.tolist() == [
        [0, 100, 0.1, 1, "proponent"],
        [0, 101, -0.2, 2, "opponent"],
        [1, 100, 0.3, 2, "proponent"],
        [1, 101, 0.4, 1, "proponent"],
    ]


def test_the_table_has_labels_and_groups() -> None:
    trainer, _, data = fitted()
    sides = ["left" if index < 24 else "right" for index in range(48)]
    for options in ({}, {"keep": 10}, {"per_example": True}):
        report = trainer.influence(batch_of(data, slice(3)), **options)
        frame = report.to_dataframe(sides)
        assert frame["label"].tolist() == [int(data.tensors[1][index]) for index in frame["index"]]
        assert frame["group"].tolist() == [sides[index] for index in frame["index"]]
        for query, rows in frame.groupby("query"):
            by_rank = rows.set_index("rank")
            assert by_rank.loc[1, "index"] == int(report.proponents(1).indices[query, 0])
            assert by_rank.loc[48, "index"] == int(report.opponents(1).indices[query, 0])
            assert by_rank.sort_index()["score"].is_monotonic_decreasing
        assert (frame["kind"] == "opponent").tolist() == (frame["score"] < 0).tolist()
        assert "label" not in report.to_dataframe(labels=False)
    assert frame.equals(report.to_dataframe(dict(enumerate(sides))))
    with pytest.raises(ConfigurationError, match="`groups` has 3 values"):
        report.to_dataframe(["a", "b", "c"])


def test_the_table_of_self_influence_has_no_kinds() -> None:
    trainer, _, _ = fitted()
    frame = trainer.self_influence().to_dataframe()
    assert list(frame.columns) == ["query", "index", "score", "rank", "label"]


def test_the_table_needs_the_dataset_only_for_labels_that_are_not_known(tmp_path: Path) -> None:
    trainer, _, data = fitted()
    trainer.influence(batch_of(data, slice(3))).save(tmp_path / "report")
    alone = InfluenceReport.load(tmp_path / "report")
    assert alone.to_dataframe()["label"].tolist() == data.tensors[1].tolist()
    alone.labels = None  # as in a folder of an earlier version
    assert list(alone.to_dataframe().columns) == ["query", "index", "score", "rank", "kind"]
    alone.dataset = data
    assert alone.to_dataframe()["label"].tolist() == data.tensors[1].tolist()
