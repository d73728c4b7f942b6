"""The names of classes, as a data module or a dataset has them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigurationError
from .identity import innermost

__all__ = ["check_class_names", "find_class_names"]


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
