"""Edits and scores keep their bits. A commit that changes them says so, and records them again."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest

from .golden.record import NETS, VALUES, WORLDS, compute, environment

Values = dict[str, tuple[str, float]]

STORED = json.loads(VALUES.read_text())


QUICK = ("perceptron", 1)
SLOW = {world: [name for name in NETS if (name, world) != QUICK] for world in WORLDS}
RUNS = [
    pytest.param(*QUICK),
    *(
        pytest.param(name, world, marks=pytest.mark.xdist_group(f"golden {world}"))
        for world in WORLDS
        for name in SLOW[world]
    ),
]


@pytest.fixture(scope="session")
def computed() -> Callable[[str, int], Values]:
    """The values of one network. The first test of a number of processes computes them for all networks."""
    launch = cache(compute)

    def computed(name: str, world: int) -> Values:
        return launch(world, *([name] if (name, world) == QUICK else SLOW[world]))[name]

    return computed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), RUNS)
def test_edits_and_scores_equal_the_recorded_ones(
    name: str, world: int, computed: Callable[[str, int], Values]
) -> None:
    expected = {call: tuple(value) for call, value in STORED["values"][f"{name}, {world}"].items()}
    if STORED["environment"] != environment():
        pytest.skip(f"recorded with {STORED['environment']}; here other rounding, {environment()}")
    found = computed(name, world)
    assert found.keys() == expected.keys()
    assert not {call: (found[call], expected[call]) for call in expected if found[call] != expected[call]}
