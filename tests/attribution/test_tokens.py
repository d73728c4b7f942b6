"""The tokens of a text in a report: as words, and how the loss depends on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lightning_gif import ConfigurationError, GIFCallback, InfluenceReport
from lightning_gif.data.names import tokens_of

from ..conftest import Classifier, batch_of, fitted
from ..nets import TOKENS, make
from ..reports import bars_of, titles, words

VOCABULARY = [f"word{number}" for number in range(TOKENS)]


class Tokenizer:
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [VOCABULARY[one] for one in ids]


def asked(name: str, vocabulary: Any = VOCABULARY) -> tuple[InfluenceReport, Any, Any]:
    net, data = make(name, 48)
    trainer, module, dataset = fitted(Classifier(net), data, GIFCallback(vocabulary=vocabulary))
    return trainer.influence(batch_of(dataset, [4]), k=2), module.eval(), dataset


@pytest.mark.parametrize("name", ["embedding", "attention"])
def test_each_token_has_the_change_of_the_loss_without_its_embedding_to_first_order(name: str) -> None:
    report, module, dataset = asked(name)
    x, y = batch_of(dataset, [4])
    (tokens,) = report.tokens
    assert [token for token, _ in tokens] == [VOCABULARY[one] for one in x[0].tolist()]
    size = 1e-3
    for position, (_, effect) in enumerate(tokens):
        losses = []
        for share in (-size, size):
            factor = torch.ones(x.shape[1], 1).index_fill(0, torch.tensor([position]), 1 - share)
            hook = module.net.embedding.register_forward_hook(lambda _, __, output, factor=factor: output * factor)
            losses.append(float(F.cross_entropy(module.double()(x), y)))
            hook.remove()
        assert effect == pytest.approx((losses[1] - losses[0]) / (2 * size), rel=1e-3, abs=1e-6)


def test_a_plot_and_the_text_of_a_report_name_the_tokens_that_matter() -> None:
    report, _, dataset = asked("embedding")
    figure = report.plot()
    title = "Its loss without a token"
    for name, length in bars_of(figure, title).items():
        assert any(token == name and effect == pytest.approx(length) for token, effect in report.tokens[0])
    best = max(report.tokens[0], key=lambda one: abs(one[1]))
    assert f"{best[0]} {best[1]:+.2g}" in str(report)
    text = " ".join(VOCABULARY[one] for one in dataset.tensors[0][4].tolist())
    assert text in [one.replace("\n", " ") for one in words(figure)]
    strongest = int(report.proponents().indices[0, 0])
    assert " ".join(VOCABULARY[one] for one in dataset.tensors[0][strongest].tolist()) in words(figure)


@pytest.mark.parametrize("vocabulary", [Tokenizer(), dict(enumerate(VOCABULARY))])
def test_a_vocabulary_may_be_a_tokenizer_or_a_mapping(vocabulary: Any) -> None:
    report, _, dataset = asked("embedding", vocabulary)
    expected = [VOCABULARY[one] for one in dataset.tensors[0][4].tolist()]
    assert [token for token, _ in report.tokens[0]] == expected
    assert report.queries[0].text == " ".join(expected)


def test_without_a_vocabulary_tokens_have_their_id_and_position(tmp_path: Path) -> None:
    report, _, dataset = asked("embedding", None)
    ids = dataset.tensors[0][4].tolist()
    assert [token for token, _ in report.tokens[0]] == [f"{one} at position {i}" for i, one in enumerate(ids)]
    report.save(tmp_path / "report")
    loaded = InfluenceReport.load(tmp_path / "report")
    assert loaded.tokens == report.tokens
    assert titles(loaded.plot()) == titles(report.plot())


def test_a_model_without_tokens_has_none_and_a_wrong_vocabulary_is_refused() -> None:
    trainer, _, dataset = fitted()
    assert trainer.influence(batch_of(dataset, [4])).tokens == []
    with pytest.raises(ConfigurationError, match=r"`vocabulary` must be a list of all tokens .* got 5"):
        GIFCallback(vocabulary=5)


def test_a_tokenizer_need_not_know_all_ids() -> None:
    class Strict:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            if min(ids) < 0:  # as the fast tokenizers of transformers do for the mark of padded labels
                raise OverflowError("out of range integral type conversion attempted")
            return Tokenizer().convert_ids_to_tokens(ids)

    assert tokens_of(Strict(), [1, -100, TOKENS]) == ["word1", "-100", str(TOKENS)]
