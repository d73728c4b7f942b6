"""Every error and warning of the package. Each is raised before the user's weights are touched."""

from __future__ import annotations

from ._compat import MisconfigurationException

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
    """Base class of the errors of this package."""


class ConfigurationError(GIFError, MisconfigurationException, ValueError):
    """An argument, or the trainer it meets, is not one the package can work with."""


class SelectionError(GIFError, ValueError):
    """No target parameters can be picked: nothing selectable, nothing cached, or names that match nothing."""


class TrainingDataError(GIFError, ValueError):
    """The training examples cannot be read in a stable order, or there are none."""


class BatchError(GIFError, ValueError):
    """A batch is empty or does not have the structure that the model trains on."""


class ObjectiveError(GIFError, ValueError):
    """The loss of the module cannot be had, or does not depend on what is to be changed."""


class NonFiniteError(GIFError, ArithmeticError):
    """A loss, a gradient or a solve produced NaN or infinity."""


class ConvergenceError(GIFError, ArithmeticError):
    """A solve diverged, or did not converge while ``unconverged="raise"`` was asked for."""


class EditError(GIFError, ValueError):
    """A recorded edit does not fit the model or the file it is used with."""


class RecordError(GIFError, ValueError):
    """A record of edits is damaged or cannot be written."""


class CheckpointError(GIFError, ValueError):
    """A checkpoint cannot be read without running what is in it, is damaged, or does not fit the model."""


class RankError(GIFError, RuntimeError):
    """Another process of the trainer failed or ended, or does something else than this one."""


class GIFWarning(UserWarning):
    """Base class of the warnings of this package."""


class ConvergenceWarning(GIFWarning):
    """A solve stopped before its residual reached ``rtol``, or where it met negative curvature."""
