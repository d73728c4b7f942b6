"""The statistics cached in training, and the selectors that read them."""

from .selectors import SELECTORS, Layer, Selector, check_selector, is_name, select, whole_neurons
from .statistics import GradientStatistics, NeuronStatistics

__all__ = [
    "SELECTORS",
    "GradientStatistics",
    "Layer",
    "NeuronStatistics",
    "Selector",
    "check_selector",
    "is_name",
    "select",
    "whole_neurons",
]
