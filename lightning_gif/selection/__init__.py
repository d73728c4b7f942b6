"""Target parameters: the statistics gathered in training, and the selectors that use them."""

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
