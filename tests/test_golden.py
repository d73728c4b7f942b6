"""Edits and scores keep their bits: what a commit changes of them, it says so and records anew."""

from __future__ import annotations

import json

import pytest

from .golden.record import NETS, VALUES, WORLDS, compute, environment

STORED = json.loads(VALUES.read_text())


QUICK = ("perceptron", 1)
RUNS = [
    pytest.param(name, world, marks=() if (name, world) == QUICK else pytest.mark.slow)
    for name in NETS
    for world in WORLDS
]


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_edits_and_scores_are_those_that_were_recorded(name: str, world: int) -> None:
    expected = {call: tuple(value) for call, value in STORED["values"][f"{name}, {world}"].items()}
    if STORED["environment"] != environment():
        pytest.skip(f"recorded with {STORED['environment']}; here other rounding, {environment()}")
    found = compute(name, world)
    assert found.keys() == expected.keys()
    assert not {call: (found[call], expected[call]) for call in expected if found[call] != expected[call]}
