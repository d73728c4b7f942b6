"""The names of classes and tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._compat import rank_zero_warn
from ..errors import ConfigurationError, GIFWarning
from .identity import innermost

__all__ = [
    "Vocabulary",
    "check_class_names",
    "check_vocabulary",
    "find_class_names",
    "tokens_of",
    "warn_of_missing_names",
]


def check_class_names(names: Any) -> None:
    """Checks the argument ``class_names``.

    Raises:
        ConfigurationError: If it is neither ``None`` nor a sequence of texts.
    """
    if names is not None and not _are_names(names):
        raise ConfigurationError(
            "`class_names` must be a list with the name of each class as text, in the order of the labels, such as"
            f" ['cat', 'dog'] for the labels 0 and 1, or None, got {names!r:.200}."
        )


def warn_of_missing_names(names: Sequence[str] | None, *labels: Tensor | None) -> None:
    """Warns if there are labels that have no name.

    Args:
        names: The name of each class, in the order of the labels; ``None`` if they are not known.
        labels: Labels of examples, each of shape ``(n,)``; ``None`` if they are not known.
    """
    largest = max((int(some.max()) for some in labels if some is not None and some.numel()), default=-1)
    if names is not None and largest >= len(names):
        rank_zero_warn(
            f"There are names of {len(names)} classes, but the data have the label {largest}. Reports show labels"
            f" without a name as numbers. Set class_names of GIFCallback to a list of {largest + 1} names, in the order"
            " of the labels.",
            category=GIFWarning,
        )


def find_class_names(*owners: Any) -> list[str] | None:
    """The attribute ``classes`` of the first owner that has one with texts; ``None`` if none has.

    Args:
        owners: Data modules and datasets. For a ``Subset``, the dataset below it is asked as well.
    """
    for owner in owners:
        for one in (owner, innermost(owner, torch.zeros(0, dtype=torch.long))[0]):
            with contextlib.suppress(Exception):  # an attribute of the user's that cannot be read has no names
                names = getattr(one, "classes", None)
                if names is not None and _are_names(names):
                    return list(names)
    return None


def _are_names(given: Any) -> bool:
    is_list = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    return is_list and len(given) > 0 and all(isinstance(name, str) for name in given)


Vocabulary: TypeAlias = "Sequence[str] | Mapping[int, str] | Any"
"""The tokens of a text by their ids: a list, a mapping, or a tokenizer with a method ``convert_ids_to_tokens``."""


def check_vocabulary(vocabulary: Any) -> None:
    """Checks the argument ``vocabulary``.

    Raises:
        ConfigurationError: If it is none of :data:`Vocabulary`, nor ``None``.
    """
    known = vocabulary is None or isinstance(vocabulary, Mapping) or _are_names(vocabulary)
    if not known and not callable(getattr(vocabulary, "convert_ids_to_tokens", None)):
        raise ConfigurationError(
            "`vocabulary` must be a list of all tokens in the order of their ids, a mapping from ids to tokens, a"
            f" tokenizer with a method `convert_ids_to_tokens` (as in transformers), or None, got {vocabulary!r:.200}."
        )


def tokens_of(vocabulary: Vocabulary | None, ids: list[int]) -> list[str]:
    """The tokens with some ids; the id itself as text for those that the vocabulary does not have."""
    if hasattr(vocabulary, "convert_ids_to_tokens"):
        return [_token_of(vocabulary, one) for one in ids]
    if isinstance(vocabulary, Mapping):
        return [str(vocabulary.get(one, one)) for one in ids]
    known = vocabulary or ()
    return [known[one] if 0 <= one < len(known) else str(one) for one in ids]


def _token_of(tokenizer: Any, one: int) -> str:
    """The token with an id, by a tokenizer."""
    token = None
    with contextlib.suppress(Exception):  # tokenizers raise errors of many kinds for an id that they do not have
        (token,) = tokenizer.convert_ids_to_tokens([one])
    return str(one) if token is None else str(token)
