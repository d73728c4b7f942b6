"""Edits of the weights that remove or correct training examples.

``lightning_gif.unlearning`` exports the types for custom strategies, and the tuned numbers of an edit. A call starts in
:mod:`lightning_gif.unlearning.unlearn`. The goals are in :mod:`lightning_gif.unlearning.goals`.
"""

from .._moved import forward
from .goals import GOALS, ClassRemoval, ExampleRemoval, Goal, LabelCorrection
from .line_search import LineSearch
from .matching import Matching
from .preconditioner import Preconditioner
from .problem import EditProblem
from .protocol import QuadraticModel, Trial
from .strategies import STRATEGIES
from .task import SampleSizes
from .trust_region import TrustRegion
from .tuning import Relinearisation, Tuning
from .unlearn import unlearn

__all__ = [
    "GOALS",
    "STRATEGIES",
    "ClassRemoval",
    "EditProblem",
    "ExampleRemoval",
    "Goal",
    "LabelCorrection",
    "LineSearch",
    "Matching",
    "Preconditioner",
    "QuadraticModel",
    "Relinearisation",
    "SampleSizes",
    "Trial",
    "TrustRegion",
    "Tuning",
    "unlearn",
]

__getattr__ = forward(__name__)
