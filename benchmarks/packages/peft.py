"""LoRA and IA³ adapters of peft, on small random models of transformers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from peft import IA3Config, LoraConfig, get_peft_model

from . import Case, Items, fitted
from .transformers import LanguageModule, bert, continued, gpt2, labelled, logits, of_tokens, texts


def train(model: Any, config: Any, collate: Any, callbacks: list[Any]) -> Any:
    module = LanguageModule(get_peft_model(model(), config))
    return fitted(module, Items(texts()), callbacks, collate_fn=collate)


CASES = [
    Case(
        "LoRA on GPT2, next token",
        partial(train, gpt2, LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True), continued),
        logits,
        lambda z, batch: of_tokens(z[:, :-1], batch["labels"][:, 1:]),
    ),
    Case(
        "LoRA on BERT, text classification",
        partial(train, bert, LoraConfig(r=2, task_type="SEQ_CLS", lora_dropout=0.1), labelled),
        logits,
        lambda z, batch: F.cross_entropy(z, batch["labels"]),
    ),
    Case(
        "IA³ on BERT, text classification",
        partial(train, bert, IA3Config(task_type="SEQ_CLS"), labelled),
        logits,
        lambda z, batch: F.cross_entropy(z, batch["labels"]),
    ),
]
