"""Texts, tagged tokens and tables: batches with dictionaries, nested tuples and padding, and other losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_gif import GIFCallback, GIFWarning
from lightning_gif.attribution.display import rows
from lightning_gif.curvature.solve import open_curvature
from lightning_gif.data.examples import Examples
from lightning_gif.defaults import for_influence
from lightning_gif.objective.objective import Objective

from .conftest import make_trainer, weights

WORDS, NEGATIVE, POSITIVE = 15, 1, 2
PADDING = 0


class Texts(Dataset[dict[str, Any]]):
    """Sequences of 3 to 9 words, one of which determines the label. The batch also has the words as strings."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for i in range(n):
            length = int(torch.randint(3, 10, (), generator=generator))
            tokens = torch.randint(3, WORDS, (length,), generator=generator)
            tokens[int(torch.randint(length, (), generator=generator))] = (NEGATIVE, POSITIVE)[i % 2]
            self.items.append({"tokens": tokens, "label": i % 2, "text": " ".join(map(str, tokens.tolist()))})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def padded(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Pads each sequence to the longest of the batch."""
    tokens = pad_sequence([item["tokens"] for item in items], batch_first=True, padding_value=PADDING)
    return {
        "tokens": tokens,
        "mask": tokens == PADDING,
        "label": torch.tensor([item["label"] for item in items]),
        "text": [item["text"] for item in items],
    }


class Encoder(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width, padding_idx=PADDING)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.layer(self.embedding(tokens), src_key_padding_mask=mask)


class TextClassifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(4, 2)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        kept = ~batch["mask"][..., None]
        hidden = (self.encoder(batch["tokens"], batch["mask"]) * kept).sum(1) / kept.sum(1)
        return F.cross_entropy(self.head(hidden), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


class Tagger(TextClassifier):
    """Predicts for each word whether it determines the label, with a loss over all words of a batch."""

    def losses(self, batch: dict[str, Any]) -> Tensor:
        targets = (batch["tokens"] <= POSITIVE).long().masked_fill(batch["mask"], -100)
        logits = self.head(self.encoder(batch["tokens"], batch["mask"]))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.losses(batch).sum() / (~batch["mask"]).sum()


class SequenceTagger(Tagger):
    """The same with a loss for each sequence: the mean over its words."""

    def influence_loss(self, batch: dict[str, Any]) -> Tensor:
        return self.losses(batch).sum(1) / (~batch["mask"]).sum(1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.influence_loss(batch).mean()


class Row(NamedTuple):
    numbers: Tensor
    category: Tensor


class Table(Dataset[tuple[Row, Tensor]]):
    """A regression from numbers and a category. The target of the first row is an outlier."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.numbers = torch.randn(n, 4, generator=generator)
        self.category = torch.randint(3, (n,), generator=generator)
        noise = 0.1 * torch.randn(n, generator=generator)
        self.target = self.numbers @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + self.category + noise
        self.target[0] += 5.0

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, index: int) -> tuple[Row, Tensor]:
        return Row(self.numbers[index], self.category[index]), self.target[index]


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: tuple[Row, Tensor], batch_idx: int) -> Tensor:
        row, target = batch
        return F.mse_loss(self.net(torch.cat([row.numbers, self.embedding(row.category)], 1))[:, 0], target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.02)


STORIES: dict[str, tuple[type[pl.LightningModule], Dataset[Any], Any]] = {
    "text": (TextClassifier, Texts(60), padded),
    "tagged words": (SequenceTagger, Texts(60), padded),
    "table": (Regression, Table(60), None),
}


def trained(name: str, epochs: int = 5) -> tuple[pl.Trainer, pl.LightningModule, DataLoader[Any]]:
    module, dataset, collate = STORIES[name]
    trainer, model = make_trainer(GIFCallback(unconverged="ignore", snapshots=0), max_epochs=epochs), module()
    trainer.fit(model, DataLoader(dataset, 10, shuffle=True, collate_fn=collate))
    return trainer, model, DataLoader(dataset, 7, collate_fn=collate)


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("name", list(STORIES))
def test_default_scores_are_those_of_the_damped_gauss_newton_matrix(name: str) -> None:
    """``(1/(n−1))·qᵀ(G + λ)⁻¹gᵢ``, with any padding of the batches."""
    trainer, model, loader = trained(name)
    query, damping = next(iter(loader)), 0.1
    with Objective.open(trainer, model, double=True) as objective:  # one text in each batch: without padding
        singles = Examples.from_loader(loader, objective.prepare, batch_size=1)
        together = Examples.from_loader(loader, objective.prepare, batch_size=60)
        objective.learn_structure(singles)
        gradients = objective.query_gradients(singles, per_example=True)
        settings = for_influence(GIFCallback().settings, ggn=True, on_targets=False)
        curvature = open_curvature(settings, objective, together)
        matrix = curvature.matvec(torch.eye(objective.space.size, dtype=torch.float64))
    directions = torch.linalg.solve(matrix + damping * torch.eye(len(matrix)), gradients[:7].mean(0))
    exact = (gradients @ directions)[None] / 59
    options: dict[str, Any] = {"double": True, "damping": damping}
    for batch_size in (4, 60):
        report = trainer.influence(query, max_iter=300, batch_size=batch_size, **options)
        assert report.solution.solver == "cg"
        assert report.curvature["kind"] == "ggn"
        torch.testing.assert_close(report.scores, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    many = trainer.influence(loader, per_example=True, solver="cg", max_iter=300, **options)
    few = trainer.influence(query, per_example=True, solver="cg", max_iter=300, **options)
    torch.testing.assert_close(many.scores[:7], few.scores, rtol=1e-4, atol=1e-4 * float(few.scores.abs().max()))


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("name", list(STORIES))
def test_influence_and_unlearning_work_on_every_kind_of_data(name: str, tmp_path: Any) -> None:
    trainer, model, loader = trained(name)
    before = weights(model)
    report = trainer.influence(next(iter(loader)), k=3)
    assert report.n_train == 60
    assert str(report.proponents().indices[0, 0].item()) in str(report)
    report.plot()
    report.save(tmp_path / "report")
    assert trainer.self_influence().scores.min() >= 0
    edit = trainer.unlearn([3, 5, 8], unseen=False)
    assert edit.n_found == 3
    edit.undo()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_texts_are_shown_with_their_labels() -> None:
    trainer, _, loader = trained("text", epochs=1)
    report = trainer.influence(next(iter(loader)), k=2)
    top = int(report.proponents().indices[0, 0])
    table = list(rows(report))
    assert any(row[1] == "query" and STORIES["text"][1][0]["text"] in str(row[-1]) for row in table)
    assert any(row[3] == top and STORIES["text"][1][top]["text"] in str(row[-1]) for row in table)


def test_a_similar_text_is_the_first_proponent_or_opponent_by_its_label() -> None:
    texts = Texts(60)
    query = {**texts[10]}
    texts.items[20], texts.items[30] = {**query}, {**query, "label": 1 - query["label"]}
    trainer = make_trainer(GIFCallback(unconverged="ignore"), max_epochs=20)
    trainer.fit(TextClassifier(), DataLoader(texts, 10, shuffle=True, collate_fn=padded))
    report = trainer.influence(padded([query]), k=2)
    assert set(report.proponents().indices[0].tolist()) == {10, 20}
    assert int(report.opponents().indices[0, 0]) == 30


def test_an_outlier_is_the_most_memorized_row() -> None:
    trainer, _, _ = trained("table", epochs=40)
    assert int(trainer.self_influence().proponents().indices[0, 0]) == 0


def test_a_loss_over_all_words_of_a_batch_is_reported_as_coupled() -> None:
    """Longer sequences have more weight than in the mean of per-sequence losses."""
    trainer, model = make_trainer(GIFCallback(unconverged="ignore"), max_epochs=1), Tagger()
    loader = DataLoader(Texts(20), 10, collate_fn=padded)
    trainer.fit(model, loader)
    with pytest.warns(GIFWarning, match="they are weighted"):
        trainer.influence(next(iter(loader)))
