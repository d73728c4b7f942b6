"""Target parameters: the statistics gathered in training, and the selectors that use them."""

from .blocks import Blocks
from .selectors import (
    SELECTORS,
    BlockSelector,
    Layer,
    LayerSelector,
    Selector,
    check_selector,
    energy_of,
    is_name,
    select,
    whole_neurons,
)
from .statistics import GradientStatistics, NeuronStatistics

__all__ = [
    "SELECTORS",
    "BlockSelector",
    "Blocks",
    "GradientStatistics",
    "Layer",
    "LayerSelector",
    "NeuronStatistics",
    "Selector",
    "check_selector",
    "energy_of",
    "is_name",
    "select",
    "whole_neurons",
]
