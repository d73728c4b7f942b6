"""Metrics of unlearning for ``torchmetrics``: how well a model has forgotten. They need no other part of this package.

The best reference is a model that was retrained without the forget examples. :class:`AccuracyGap`,
:class:`PredictionAgreement` and :class:`JensenShannonDivergence` take its predictions as an input. For
:class:`MembershipInference` and :class:`RelearnTime`, compute the metric for both models and compare the values.

Two trainings differ by chance. To see whether unlearned models differ from retrained ones by more than that, compare
several of each: :class:`KLOM`, :class:`LikelihoodRatioAttack`, :class:`ForgettingScore` and :class:`RetrainingDistance`
take the :func:`margins` of groups of models. :class:`RMIA` is a strong attack on one model, with few reference models.

A metric is NaN until it has seen an example of each group that it needs. All metrics work in distributed runs.
"""

from typing import TYPE_CHECKING

from .._lazy import on_first_use

if TYPE_CHECKING:
    from .ensembles import KLOM, RMIA, LikelihoodRatioAttack, RetrainingDistance
    from .forgetting_score import ForgettingScore
    from .groups import Stratum, by_memorization, margins
    from .models import (
        AccuracyGap,
        JensenShannonDivergence,
        MembershipInference,
        PredictionAgreement,
        RelabelF1,
        RelearnTime,
        RemovalF1,
    )
else:
    __getattr__ = on_first_use(
        __name__,
        {
            "ensembles": "KLOM RMIA LikelihoodRatioAttack RetrainingDistance",
            "forgetting_score": "ForgettingScore",
            "groups": "Stratum by_memorization margins",
            "models": "AccuracyGap JensenShannonDivergence MembershipInference PredictionAgreement RelabelF1"
            " RelearnTime RemovalF1",
        },
    )

__all__ = [
    "KLOM",
    "RMIA",
    "AccuracyGap",
    "ForgettingScore",
    "JensenShannonDivergence",
    "LikelihoodRatioAttack",
    "MembershipInference",
    "PredictionAgreement",
    "RelabelF1",
    "RelearnTime",
    "RemovalF1",
    "RetrainingDistance",
    "Stratum",
    "by_memorization",
    "margins",
]
