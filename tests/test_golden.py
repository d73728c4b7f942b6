"""Edits and scores keep their bits. A commit that changes them says so, and records them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest

from .golden.record import NETS, VALUES, WORLDS, compute, environment

Values = dict[str, tuple[str, float]]

STORED = json.loads(VALUES.read_text())


RUNS = [
    pytest.param(name, world, marks=pytest.mark.xdist_group(f"golden {world}")) for world in WORLDS for name in NETS
]


@pytest.fixture(scope="session")
def computed() -> Callable[[int], dict[str, Values]]:
    """The values of all networks, by name. The first test of a number of processes computes them."""
    return cache(compute)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), RUNS)
def test_edits_and_scores_equal_the_recorded_ones(
    name: str, world: int, computed: Callable[[int], dict[str, Values]]
) -> None:
    expected = {call: tuple(value) for call, value in STORED["values"][f"{name}, {world}"].items()}
    if STORED["environment"] != environment():
        pytest.skip(f"recorded with {STORED['environment']}; here other rounding, {environment()}")
    found = computed(world)[name]
    assert found.keys() == expected.keys()
    assert not {call: (found[call], expected[call]) for call in expected if found[call] != expected[call]}
