"""Metrics of unlearning for ``torchmetrics``: how well a model has forgotten. They need no other part of this package.

The best reference is a model that was retrained without the forget examples. :class:`AccuracyGap`,
:class:`PredictionAgreement` and :class:`JensenShannonDivergence` take its predictions as an input. For
:class:`MembershipInference` and :class:`RelearnTime`, compute the metric for both models and compare the values.

A metric is NaN until it has seen an example of each group that it needs. All metrics work in distributed runs.
"""

from .models import (
    AccuracyGap,
    JensenShannonDivergence,
    MembershipInference,
    PredictionAgreement,
    RelabelF1,
    RelearnTime,
    RemovalF1,
)

__all__ = [
    "AccuracyGap",
    "JensenShannonDivergence",
    "MembershipInference",
    "PredictionAgreement",
    "RelabelF1",
    "RelearnTime",
    "RemovalF1",
]
