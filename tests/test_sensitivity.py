"""The benchmark of the tuned numbers varies each of them within its range, and prints the effects."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest

from lightning_gif.unlearning import GOALS, Tuning

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import sensitivity


@pytest.mark.parametrize("goal", GOALS)
def test_each_number_is_halved_and_doubled_as_far_as_its_range_allows(goal: str) -> None:
    found = list(sensitivity.variations(goal))
    default = Tuning()
    parts = {"goal": GOALS[goal](), **{entry.name: getattr(default, entry.name) for entry in fields(Tuning)[1:]}}
    names = {(part, entry.name) for part, group in parts.items() for entry in fields(group)}
    assert {(variation.part, variation.name) for variation in found} == names
    for variation in found:
        value = getattr(parts[variation.part], variation.name)
        assert (variation.value < value) == (variation.factor < 1)
        assert value / 2 <= variation.value <= 2 * value
        assert variation.tuning(goal) != default  # which checks the range


@pytest.mark.slow
def test_the_table_has_the_defaults_and_the_effect_of_each_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sensitivity.py", "--smallest"])
    sensitivity.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header, _, *rows = rows
    assert header[:4] == ["number", "value", "goal", "network"]
    assert {len(row) for row in rows} == {len(header)}
    for goal in ("class", "examples", "labels"):
        of_goal = [row for row in rows if row[2] == goal]
        defaults, varied = of_goal[:2], of_goal[2:]
        assert [row[:2] for row in defaults] == [["`relinearise`", "defaults"], ["`search`", "defaults"]]
        assert len(varied) == len(list(sensitivity.variations(goal))[::20])
        for row in varied:
            assert float(row[-1]) in (0.0, 1.0)
            if row[-1] == "0.00":  # the same weights do the same
                assert all(float(cell) == 0 for cell in row[4:7])
