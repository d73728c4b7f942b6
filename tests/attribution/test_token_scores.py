"""The scores of the tokens of training texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gif import ConfigurationError, GIFCallback, InfluenceReport, ObjectiveError

from ..conftest import fitted as fitted_classifier
from ..conftest import make_trainer

TOKENS, LENGTH = 7, 5


def by_cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)


def by_module(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.CrossEntropyLoss(ignore_index=0)(logits[:, :-1].mT, ids[:, 1:])


def by_hand(logits: Tensor, ids: Tensor) -> Tensor:
    wanted = ids[:, 1:]
    found = -logits[:, :-1].log_softmax(-1).gather(-1, wanted[..., None])[..., 0] * (wanted != 0)
    return (found.sum(1) / (wanted != 0).sum(1)).mean()


def by_nll(logits: Tensor, ids: Tensor) -> Tensor:
    return 2 * F.nll_loss(F.log_softmax(logits[:, :-1].flatten(0, 1), 1), ids[:, 1:].flatten(), ignore_index=0) / 2


class LanguageModel(pl.LightningModule):
    """Predicts the next token from the tokens before it. Token 0 is padding."""

    def __init__(self, loss: Any = by_cross_entropy) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loss = loss
        self.embedding, self.cells, self.head = (
            nn.Embedding(TOKENS, 6),
            nn.RNN(6, 6, batch_first=True),
            nn.Linear(6, TOKENS),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cells(self.embedding(ids))[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class WithOwnLoss(LanguageModel):
    def influence_loss(self, batch: Any) -> Tensor:
        logits, wanted = self(batch[0])[:, :-1], batch[0][:, 1:]
        found = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=0, reduction="none")
        return found.view_as(wanted).sum(1) / (wanted != 0).sum(1)


def texts(n: int = 20) -> TensorDataset:
    ids = torch.randint(1, TOKENS, (n, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[::2, -1] = 0
    return TensorDataset(ids)


def fitted(module: pl.LightningModule, **options: Any) -> tuple[pl.Trainer, TensorDataset]:
    trainer, data = make_trainer(GIFCallback(double=True, damping=0.1, **options), max_epochs=3), texts()
    trainer.fit(module, DataLoader(data, 5))
    return trainer, data


MODULES = {
    "cross_entropy": LanguageModel,
    "CrossEntropyLoss": lambda: LanguageModel(by_module),
    "log_softmax and gather": lambda: LanguageModel(by_hand),
    "nll_loss": lambda: LanguageModel(by_nll),
    "influence_loss": WithOwnLoss,
}


@pytest.mark.filterwarnings("ignore:The loss that:lightning_gif.GIFWarning")
@pytest.mark.parametrize("name", list(MODULES))
def test_token_scores_are_products_with_the_gradients_of_the_tokens(name: str, tmp_path: Path) -> None:
    trainer, data = fitted(MODULES[name](), snapshots=0)
    module, query = trainer.lightning_module, data[:2]
    report = trainer.influence(query, tokens=True, k=2)
    module.double()
    parameters = list(module.parameters())
    ihvp = report.solutions[0].x.split([one.numel() for one in parameters])
    for index in map(int, torch.cat([report.proponents().indices[0], report.opponents().indices[0]])):
        ids = data[index][0][None]
        wanted = ids[0, 1:]
        losses = F.cross_entropy(module(ids)[0, :-1], wanted, reduction="none")[wanted != 0]
        expected = []
        for loss in losses / len(losses):
            slopes = torch.autograd.grad(loss, parameters, retain_graph=True)
            product = sum(float(slope.flatten() @ part) for slope, part in zip(slopes, ihvp, strict=True))
            expected.append(product / (len(data) - 1))
        found = report.token_scores(index)
        if name == "log_softmax and gather":  # that padding does not count is not known
            assert all(score == 0 for token, score in found if token == "0")
            found = [(token, score) for token, score in found if token != "0"]
        assert [token for token, _ in found] == list(map(str, wanted[wanted != 0].tolist()))
        assert [score for _, score in found] == pytest.approx(expected, rel=1e-5, abs=1e-12)
        assert sum(score for _, score in found) == pytest.approx(float(report.scores[0, index]), rel=1e-5)
    report.save(tmp_path / "report")
    assert InfluenceReport.load(tmp_path / "report").train_tokens == report.train_tokens


def test_token_scores_of_several_queries_and_states_add_up_to_those_of_the_texts() -> None:
    trainer, data = fitted(LanguageModel(), snapshots=1)
    module = trainer.lightning_module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report = trainer.influence(data[:3], tokens=True, per_example=True, k=3)
    assert len(report.settings["snapshots"]) == 1
    for query in range(3):
        for index in map(int, report.proponents().indices[query]):
            total = sum(score for _, score in report.token_scores(index, query))
            assert total == pytest.approx(float(report.scores[query, index]), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert report.scores.equal(trainer.influence(data[:3], per_example=True, k=3).scores)


def test_the_page_of_a_report_colours_the_tokens_by_their_scores() -> None:
    words = ["<pad>", "Ġa", "Ġ<b>", "Ġc", "Ġd", "e", "f"]
    trainer, data = fitted(LanguageModel(), snapshots=0, vocabulary=words)
    report = trainer.influence(data[:2], tokens=True, k=1)
    index = int(report.proponents().indices[0, 0])
    page = report._repr_html_()
    cells = re.findall(r'<span class="token" style="background: (#\w{8})" title="([^"]+)">([^<]*)</span>', page)
    assert [text for *_, text in cells[: len(report.token_scores(index))]] == [
        token.replace("Ġ", " ").replace("<", "&lt;").replace(">", "&gt;") for token, _ in report.token_scores(index)
    ]
    shades = [int(colour[-2:], 16) for colour, *_ in cells[: len(report.token_scores(index))]]
    sizes = [abs(score) for _, score in report.token_scores(index)]
    assert shades.index(max(shades)) == sizes.index(max(sizes))


def test_what_has_no_token_scores_is_refused_with_a_way_out(tmp_path: Path) -> None:
    trainer, _, data = fitted_classifier()
    with pytest.raises(
        ObjectiveError, match=r"no parts for several tokens.* Omit `tokens`, or compute the loss by one call"
    ):
        trainer.influence(data[:4], tokens=True)
    plain = trainer.influence(data[:4])
    with pytest.raises(ConfigurationError, match=r"no scores of tokens. Call trainer.influence\(batch, tokens=True\)"):
        plain.token_scores(0)
    trainer, texts = fitted(LanguageModel(), snapshots=0)
    report = trainer.influence(texts[:2], tokens=True, k=1)
    other = next(index for index in range(20) if index not in report.train_tokens)
    with pytest.raises(ConfigurationError, match=r"no token scores of example .* Pass a larger `k`"):
        report.token_scores(other)
    assert trainer.influence(texts[:2], tokens=True, k=20).token_scores(other)
    with pytest.raises(ConfigurationError, match=r"There is no query|query"):
        report.token_scores(0, 3)
    many = trainer.influence(texts[:10], tokens=True, per_example=True, k=1)
    shown = next(iter(many.train_tokens))
    with pytest.raises(ConfigurationError, match=r"first 8 queries.*with this query's example alone, and tokens=True"):
        many.token_scores(shown, 9)
    assert trainer.influence(texts[9:10], tokens=True, k=20).token_scores(shown)
    folder = tmp_path / "scores"
    trainer.influence(texts[:2], scores_to=folder, k=2)
    with pytest.raises(ConfigurationError, match=r"has the scores only. Give another folder, delete this one, or omit"):
        trainer.influence(texts[:2], scores_to=folder, tokens=True, k=2)
    assert trainer.influence(texts[:2], scores_to=tmp_path / "others", tokens=True, k=2).train_tokens
