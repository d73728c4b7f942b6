"""What comes back, how it is drawn, and how each logger gets it."""

from ..attribution.groups import Groups
from ..attribution.ranking import Ranking
from ..attribution.report import InfluenceReport
from ..unlearning.report import Change, UnlearnReport

__all__ = ["Change", "Groups", "InfluenceReport", "Ranking", "UnlearnReport"]
