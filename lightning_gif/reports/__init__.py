"""What comes back, how it is drawn, and how each logger gets it."""

from ..ranking import Ranking
from .groups import Groups
from .influence import InfluenceReport
from .unlearning import Change, UnlearnReport

__all__ = ["Change", "Groups", "InfluenceReport", "Ranking", "UnlearnReport"]
