"""Language models of transformers with small random configurations, in a plain module, on padded texts."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from . import Case, Items, fitted

VOCABULARY = 14
PAD, IGNORED = 0, -100


def texts(n: int = 24) -> list[Tensor]:
    """Texts of four to seven tokens that count upwards."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(2, VOCABULARY, (n,), generator=generator)
    return [(start + torch.arange(4 + i % 4)) % (VOCABULARY - 2) + 2 for i, start in enumerate(starts.tolist())]


def padded(rows: list[Tensor], value: int = PAD) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


def labelled(items: list[Tensor]) -> dict[str, Tensor]:
    """Whether a text starts with an even token."""
    ids = padded(items)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.stack([t[0] % 2 for t in items])}


def continued(items: list[Tensor]) -> dict[str, Tensor]:
    ids = padded(items)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": padded(items, IGNORED)}


def reversed_texts(items: list[Tensor]) -> dict[str, Tensor]:
    ids, labels = padded(items), padded([text.flip(0) for text in items], IGNORED)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


class LanguageModule(pl.LightningModule):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def bert() -> PreTrainedModel:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, num_labels=2, **small)
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def llama() -> PreTrainedModel:
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **small))


def t5() -> PreTrainedModel:
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, pad_token_id=PAD, decoder_start_token_id=PAD, **small)
    )


def train(model: Any, collate: Any, callbacks: list[Any]) -> Any:
    return fitted(LanguageModule(model()), Items(texts()), callbacks, collate_fn=collate)


def logits(module: Any, batch: Any) -> Tensor:
    return module.model(**batch).logits


def of_tokens(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


CASES = [
    Case(
        "BERT, text classification",
        partial(train, bert, labelled),
        logits,
        lambda z, batch: F.cross_entropy(z, batch["labels"]),
    ),
    Case(
        "GPT2, next token",
        partial(train, gpt2, continued),
        logits,
        lambda z, batch: of_tokens(z[:, :-1], batch["labels"][:, 1:]),
    ),
    Case(
        "Llama, next token",
        partial(train, llama, continued),
        logits,
        lambda z, batch: of_tokens(z[:, :-1], batch["labels"][:, 1:]),
    ),
    Case(
        "T5, sequence to sequence", partial(train, t5, reversed_texts), logits, lambda z, b: of_tokens(z, b["labels"])
    ),
]
