"""The errors and warnings of the package. Every error is raised before any weight is changed."""

from __future__ import annotations

from functools import cache
from typing import Any

from . import _compat

__all__ = [
    "BatchError",
    "CheckpointError",
    "ConfigurationError",
    "ConvergenceError",
    "ConvergenceWarning",
    "EditError",
    "GIFError",
    "GIFWarning",
    "NonFiniteError",
    "ObjectiveError",
    "RankError",
    "RecordError",
    "SelectionError",
    "TrainingDataError",
]


class GIFError(Exception):
    """Base class of the errors of this package. When one is raised, the weights are unchanged."""


class ConfigurationError(GIFError, ValueError):
    """An argument has an invalid value, or the trainer is not supported.

    Each instance is a ``MisconfigurationException`` of Lightning, too, if Lightning is imported. This class is not,
    because it would import Lightning, which takes seconds.
    """

    def __new__(cls, *args: Any) -> ConfigurationError:
        return super().__new__(_of_lightning() if cls is ConfigurationError and _compat.is_loaded() else cls, *args)

    def __reduce__(self) -> tuple[type[ConfigurationError], tuple[Any, ...], dict[str, Any]]:
        return ConfigurationError, self.args, vars(self)


@cache
def _of_lightning() -> type[ConfigurationError]:
    """The class of instances while Lightning is imported."""
    names = {"__module__": __name__, "__qualname__": ConfigurationError.__qualname__}
    return type("ConfigurationError", (ConfigurationError, _compat.MisconfigurationException), names)


class SelectionError(GIFError, ValueError):
    """No target parameters can be picked: no layer can be ranked, statistics are missing, or a name has no match."""


class TrainingDataError(GIFError, ValueError):
    """There are no training examples, or they cannot be read in a stable order."""


class BatchError(GIFError, ValueError):
    """A batch is empty, or does not have the structure of the training batches."""


class ObjectiveError(GIFError, ValueError):
    """The loss of single examples cannot be computed, or does not depend on the target parameters."""


class NonFiniteError(GIFError, ArithmeticError):
    """A loss, a gradient, a solve or an edit has NaN or infinite values."""


class ConvergenceError(GIFError, ArithmeticError):
    """A solve diverged, or did not converge with ``unconverged="raise"``."""


class EditError(GIFError, ValueError):
    """An edit does not fit the weights that it is applied to, or its file is damaged."""


class RecordError(GIFError, ValueError):
    """The audit log is damaged or cannot be written."""


class CheckpointError(GIFError, ValueError):
    """A checkpoint is damaged, does not fit the model, or cannot be read without running code in it."""


class RankError(GIFError, RuntimeError):
    """Another process of the trainer has failed or ended, or makes a different call.

    Attributes:
        raised_elsewhere: ``OSError`` or ``Exception``, if an error of that class on another process stopped all
            processes at the same place. The processes are then still in step. ``None`` otherwise.
    """

    raised_elsewhere: type[Exception] | None = None


class GIFWarning(UserWarning):
    """Base class of the warnings of this package."""


class ConvergenceWarning(GIFWarning):
    """A solve ended before its residual reached ``rtol``, or at a direction of negative curvature."""
