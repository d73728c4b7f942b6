"""What comes back, how it is drawn, and how each logger gets it."""

from .influence import InfluenceReport, Ranking
from .unlearning import Change, UnlearnReport

__all__ = ["Change", "InfluenceReport", "Ranking", "UnlearnReport"]
