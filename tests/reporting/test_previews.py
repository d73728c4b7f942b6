"""Examples as pictures, labels and words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gif.reporting.previews import Shown, image_of, label_of, text_of


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ((np.array([0.5, 2.0])[::-1], 1), "2, 0.5"),
        ({"x": np.arange(2, dtype=np.uint16), "label": 2}, "x: 0, 1"),
        ((np.array([1.5], dtype=">f4"), 1), "[1.5]"),
        ((np.array(["2020-01-02"], dtype="datetime64"), 1), "['2020-01-02']"),
        ((np.array("word"), 1), "word"),
    ],
)
def test_arrays_of_any_kind_in_words(item: Any, text: str) -> None:
    assert Shown.of(item).text == text


@pytest.mark.parametrize(
    ("item", "shape"),
    [
        ((torch.rand(1, 8, 9), 3), (8, 9)),
        (torch.rand(8, 9), (8, 9)),
        ({"x": torch.rand(3, 8, 9), "y": 1}, (8, 9, 3)),
        ((torch.rand(8, 9, 3), 1), (8, 9, 3)),
        ((torch.zeros(1, 8, 8), 3), (8, 8)),
        ((torch.full((1, 8, 8), math.nan), 3), (8, 8)),
        ((torch.rand(12), 3), None),
        ((torch.rand(4, 4), 3), None),
        ((torch.rand(2, 8, 8), 3), None),
        ("words", None),
    ],
)
def test_what_counts_as_an_image(item: Any, shape: tuple[int, ...] | None) -> None:
    found = image_of(item)
    assert (None if found is None else found.shape) == shape
    assert found is None or found.dtype == np.uint8


def test_a_large_image_is_shown_smaller_with_its_own_colours() -> None:
    image = torch.zeros(3, 1030, 700)
    image[0, :515], image[2, 515:] = 1.0, 1.0
    found = image_of(image)
    assert found is not None
    assert found.shape == (343, 233, 3)
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[-1, -1].tolist() == [0, 0, 255]
    assert image_of(torch.rand(900, 8)).shape == (450, 4)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("item", "label", "text"),
    [
        ((torch.tensor([0.12345, 2.0]), torch.tensor(3)), 3, "0.123, 2"),
        ((torch.tensor([1, 2]), 3), 3, "1, 2"),
        ((torch.tensor([1, 2]), np.int64(4)), 4, "1, 2"),
        (("a good film", "positive"), "positive", "a good film"),
        ({"text": "a film", "label": 2}, 2, "a film"),
        ({"ids": torch.tensor([101, 7]), "text": "a film", "label": 2}, 2, "a film"),
        ({"ids": torch.tensor([101, 7]), "label": 2}, 2, "ids: 101, 7"),
        ({"premise": "rain", "hypothesis": "wet", "label": 0}, 0, "premise: rain; hypothesis: wet"),
        (("rain", "wet", 0), 0, "rain; wet"),
        ({"a": torch.tensor([1]), "b": torch.tensor([2.5]), "target": torch.tensor([0.5])}, 0.5, "a: 1; b: 2.5"),
        ((torch.tensor([1.0]), torch.tensor([2.0, 3.0])), None, "1, 2, 3"),
        (torch.tensor([7.0]), None, "7"),
        ((torch.arange(99), 1), 1, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, … [99]"),
    ],
)
def test_labels_and_values_in_words(item: Any, label: Any, text: str) -> None:
    assert label_of(item) == label
    assert text_of(item) == text


def test_a_long_text_is_cut() -> None:
    assert len(text_of(("word " * 1000, 1))) <= 200
