"""What comes back, how it is drawn, and how each logger gets it."""

from ..attribution.groups import Groups
from ..attribution.ranking import Ranking
from ..attribution.report import InfluenceReport
from ..attribution.validation import ValidationReport
from ..inspection.check import CheckReport
from ..unlearning.report import Change, UnlearnReport

__all__ = ["Change", "CheckReport", "Groups", "InfluenceReport", "Ranking", "UnlearnReport", "ValidationReport"]
