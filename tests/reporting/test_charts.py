"""The names and percentages in the charts of reports."""

from __future__ import annotations

from lightning_gif.reporting.charts import named, positions_of_ends


def test_a_label_is_shown_by_the_name_of_its_class_if_there_is_one() -> None:
    assert [named(label, ["cat", "dog"]) for label in (0, 1, 2, -1, "own", 0.123456)] == [
        "cat", "dog", "2", "-1", "own", "0.1235",
    ]  # fmt: skip


def test_long_names_keep_both_ends_and_fit_into_one_line() -> None:
    shown = {named(f"a rather long\nclass name {number}") for number in range(100)}
    assert len(shown) == 100
    assert max(map(len, shown)) <= 24
    assert named("a rather long class name 42") == "a rather lon … s name 42"


def test_of_many_positions_both_ends_are_left() -> None:
    assert positions_of_ends(3, 4) == [0, 1, 2]
    assert positions_of_ends(9, 4) == [0, 1, None, 7, 8]
