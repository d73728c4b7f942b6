"""Influence functions for PyTorch Lightning: find the training examples behind a prediction, and forget them.

Add :class:`GIFCallback` to a trainer and fit. Then ``trainer.influence(batch)`` ranks the training examples by their
effect on a batch, and ``trainer.unlearn(batch)`` edits the weights so that the model behaves as if it had not seen the
batch. After Lyu, Jang, Ryu and Yang, "Generalized Influence Functions", arXiv 2312.05586.
"""

from typing import TYPE_CHECKING

from ._lazy import on_first_use
from ._moved import Finder
from ._version import __version__

if TYPE_CHECKING:
    from .attribution.gradient_store import GradientStore
    from .attribution.report import InfluenceReport
    from .attribution.validation import ValidationReport
    from .callback import GIFCallback, attach
    from .curvature.methods import METHODS
    from .curvature.sampling import SAMPLERS
    from .errors import (
        BatchError,
        CheckpointError,
        ConfigurationError,
        ConvergenceError,
        ConvergenceWarning,
        EditError,
        GIFError,
        GIFWarning,
        NonFiniteError,
        ObjectiveError,
        RecordError,
        SelectionError,
        TrainingDataError,
    )
    from .fits import influence_over_fits
    from .mixin import GIFMixin
    from .selection import SELECTORS
    from .solvers import SOLVERS
    from .unlearning.report import UnlearnReport
    from .unlearning.strategies import STRATEGIES
    from .verification import Verification, verify
else:
    __getattr__ = on_first_use(
        __name__,
        {
            "attribution.gradient_store": "GradientStore",
            "attribution.report": "InfluenceReport",
            "attribution.validation": "ValidationReport",
            "callback": "GIFCallback attach",
            "curvature.methods": "METHODS",
            "curvature.sampling": "SAMPLERS",
            "errors": "BatchError CheckpointError ConfigurationError ConvergenceError ConvergenceWarning EditError"
            " GIFError GIFWarning NonFiniteError ObjectiveError RecordError SelectionError TrainingDataError",
            "fits": "influence_over_fits",
            "mixin": "GIFMixin",
            "selection": "SELECTORS",
            "solvers": "SOLVERS",
            "unlearning.report": "UnlearnReport",
            "unlearning.strategies": "STRATEGIES",
            "verification": "Verification verify",
        },
    )

__all__ = [
    "METHODS",
    "SAMPLERS",
    "SELECTORS",
    "SOLVERS",
    "STRATEGIES",
    "BatchError",
    "CheckpointError",
    "ConfigurationError",
    "ConvergenceError",
    "ConvergenceWarning",
    "EditError",
    "GIFCallback",
    "GIFError",
    "GIFMixin",
    "GIFWarning",
    "GradientStore",
    "InfluenceReport",
    "NonFiniteError",
    "ObjectiveError",
    "RecordError",
    "SelectionError",
    "TrainingDataError",
    "UnlearnReport",
    "ValidationReport",
    "Verification",
    "__version__",
    "attach",
    "influence_over_fits",
    "verify",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


Finder.install()
