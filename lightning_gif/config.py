"""The settings of the callback and of each call, as plain data whose ranges are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypedDict

import torch

from ._version import __version__
from .errors import ConfigurationError
from .registry import nearest
from .storage.digests import Fingerprint

__all__ = ["AUTO", "RATIO", "SELECTOR", "Overrides", "Settings", "check_count", "check_number"]


AUTO = "auto"
"""The value of a setting for which :mod:`lightning_gif.defaults` chooses."""

SELECTOR, RATIO = "highest_k_gradients", 0.1
"""The default selector and ratio. If neither is given, an edit of single examples changes all parameters."""


def check_count(name: str, value: Any, *, least: int = 1, optional: bool = False, others: str = "") -> None:
    """Checks an argument that must be a whole number.

    Args:
        name: The name of the argument.
        value: The given value.
        least: The smallest accepted number.
        optional: Whether ``None`` is accepted.
        others: Other accepted values, as the message should list them.

    Raises:
        ConfigurationError: If ``value`` is not accepted.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        others = "None or " if optional else others
        raise ConfigurationError(f"`{name}` must be {others}a whole number of at least {least}, got {value!r}.")


def check_number(
    name: str, value: Any, expected: str, is_in_range: Callable[[float], bool], *, optional: bool = False
) -> None:
    """Checks an argument that must be a number.

    Args:
        name: The name of the argument.
        value: The given value.
        expected: What is accepted, for the message.
        is_in_range: Whether a number is accepted.
        optional: Whether ``None`` is accepted.

    Raises:
        ConfigurationError: If ``value`` is not accepted.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_in_range(value):
        raise ConfigurationError(f"`{name}` must be {'None or ' if optional else ''}{expected}, got {value!r}.")


class Overrides(TypedDict, total=False):
    """Settings that one call may change; see :class:`~lightning_gif.GIFCallback` for their meaning."""

    selector: str | Sequence[str]
    ratio: float
    method: str
    solver: str
    damping: float | None
    max_iter: int | None
    rtol: float | None
    discrepancy: float
    curvature: str
    curvature_examples: int | Literal["auto"] | None
    curvature_sampling: str
    weight_decay: float
    eigenvalues: int
    batch_size: int
    memory: float | None
    double: bool
    unconverged: Literal["warn", "raise", "ignore"]
    seed: int


@dataclass(frozen=True)
class Settings:
    """The arguments of :class:`~lightning_gif.GIFCallback` that a call can override. They are documented there.

    Numbers are checked here. Names, and the ``ratio`` of the selector, are checked by
    :func:`lightning_gif.defaults.check_names`.

    Raises:
        ConfigurationError: If a value is out of range.
    """

    selector: str | Sequence[str]
    ratio: float
    method: str
    solver: str
    damping: float | None
    max_iter: int | None
    rtol: float | None
    discrepancy: float
    curvature: str
    curvature_examples: int | Literal["auto"] | None
    curvature_sampling: str
    weight_decay: float
    eigenvalues: int
    batch_size: int
    memory: float | None
    double: bool
    unconverged: str
    seed: int

    def __post_init__(self) -> None:
        at_least_0 = "a number of at least 0"
        check_number("damping", self.damping, at_least_0, lambda value: 0 <= value < math.inf, optional=True)
        check_number("weight_decay", self.weight_decay, at_least_0, lambda value: 0 <= value < math.inf)
        check_number("discrepancy", self.discrepancy, "a number from 0 to below 1", lambda value: 0 <= value < 1)
        check_count("eigenvalues", self.eigenvalues, least=0)
        check_number("memory", self.memory, f"{at_least_0} (GiB)", lambda value: 0 <= value < math.inf, optional=True)
        if not isinstance(self.double, bool):
            raise ConfigurationError(f"`double` must be True or False, got {self.double!r}.")
        check_count("max_iter", self.max_iter, optional=True)
        check_number("rtol", self.rtol, "a number between 0 and 1", lambda value: 0 < value < 1, optional=True)
        check_count("batch_size", self.batch_size)
        check_count("seed", self.seed, least=0)
        if self.curvature_examples not in (None, AUTO):
            check_count("curvature_examples", self.curvature_examples, others="'auto', None (all) or ")
        if self.unconverged not in ("warn", "raise", "ignore"):
            raise ConfigurationError(f"`unconverged` must be 'warn', 'raise' or 'ignore', got {self.unconverged!r}.")

    def override(self, changes: Overrides, named: Iterable[str] = ()) -> Settings:
        """The settings with changes for one call.

        Args:
            changes: The new values.
            named: The names of the other arguments of the call, which the message about a misspelled one can suggest.

        Raises:
            ConfigurationError: If an argument is unknown or a value is out of range.
        """
        known = {field.name for field in fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigurationError(f"Unknown argument {name!r}. {nearest(name, {*known, *named})}")
        return replace(self, **changes)

    def fingerprint(self) -> Fingerprint:
        """The settings on which results depend, and the versions of PyTorch and of this package."""
        settings = {name: str(value) for name, value in asdict(self).items() if name not in ("memory", "unconverged")}
        return {**settings, "the version of PyTorch": torch.__version__, "that of lightning_gif": __version__}
