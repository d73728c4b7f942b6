"""What the trainer's loggers get of training and of a call, and when the progress of a solve is shown."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import pytest

from lightning_gif import GIFCallback
from lightning_gif.reporting import progress

from ..conftest import batch_of, fitted
from ..doubles import Recorder, TableRecorder, quick


def test_loggers_get_the_choice_of_targets_with_its_overlap_from_the_second_epoch() -> None:
    logger = Recorder()
    trainer, module, _ = fitted(callback=quick(), logger=logger, max_epochs=3)
    targets = trainer.callbacks[0].targets
    counts = logger.values("gif_targets/count")
    assert len(counts) == 3
    assert counts[-1] == targets.count
    assert len(logger.values("gif_targets/jaccard")) == 2
    assert all(0 <= value <= 1 for value in logger.values("gif_targets/jaccard"))
    assert logger.values("gif_targets/share")[-1] == pytest.approx(
        targets.count / sum(p.numel() for p in module.parameters())
    )
    keys = {key for _, metrics in logger.steps for key in metrics if key.startswith("gif_targets")}
    assert keys == {f"gif_targets/{name}" for name in ("count", "share", "layers", "jaccard")}


def test_reports_go_to_all_loggers_with_the_step_and_tables_to_those_that_take_them() -> None:
    plain, tables = Recorder(), TableRecorder()
    trainer, _, data = fitted(callback=quick(), logger=[plain, tables])
    step = trainer.global_step
    trainer.influence(batch_of(data, slice(4)))
    trainer.unlearn(batch_of(data, slice(4)), dry_run=True)
    for logger in (plain, tables):
        for section in ("gif_influence", "gif_dry_run"):
            assert {s for s, metrics in logger.steps if any(key.startswith(section) for key in metrics)} == {step}
    assert plain.values("gif_influence/diagnostics/n_train") == [48]
    assert not tables.values("gif_influence/diagnostics/n_train")  # it is in the table
    assert set(tables.tables) == {
        *(f"gif_influence/{name}" for name in ("examples", "by_class", "diagnostics")),
        *(f"gif_dry_run/{name}" for name in ("events", "trials", "forgotten", "diagnostics")),
    }


def test_nothing_is_logged_when_not_wanted() -> None:
    logger = Recorder()
    trainer, _, data = fitted(callback=quick(log_reports=False), logger=logger)
    trainer.influence(batch_of(data, slice(4)))
    assert not [key for _, metrics in logger.steps for key in metrics if key.startswith("gif_")]


@pytest.mark.parametrize("bar", [False, True])
def test_progress_is_shown_only_where_the_trainer_shows_it(
    bar: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, data = fitted(callback=quick(), enable_progress_bar=bar)
    capsys.readouterr()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    trainer.influence(batch_of(data, slice(4)))
    monkeypatch.setattr(progress, "_BAR", 0.0)
    trainer.influence(batch_of(data, slice(4)))
    assert ("Scoring training examples: 48 of 48" in capsys.readouterr().err) is bar


def test_a_log_file_gets_no_progress_of_quick_calls(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _, data = fitted(callback=quick(), enable_progress_bar=True)
    capsys.readouterr()
    trainer.influence(batch_of(data, slice(4)))
    assert capsys.readouterr().err == ""


def test_a_log_file_gets_a_line_of_progress_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, data = fitted(callback=quick(), enable_progress_bar=True)
    capsys.readouterr()
    clock = itertools.count(0, 4)  # seconds
    monkeypatch.setattr(progress, "monotonic", lambda: float(next(clock)))
    trainer.influence(batch_of(data, slice(4)), batch_size=8, snapshots=False)
    lines = capsys.readouterr().err.splitlines()
    scoring = [line for line in lines if line.startswith("Scoring")]
    assert [line.split(";")[0] for line in scoring] == [f"Scoring training examples: {n} of 48" for n in (8, 32)]
    assert [line.rpartition(", ")[2] for line in scoring] == ["about 20 s left", "about 8 s left"]
    assert lines[0].startswith("Curvature: 3 of 7; 12 s so far, about ")
    assert len({*lines}) == len(lines)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(
    ("solver", "products"),  # 3 of them measure the damping, and EK-FAC takes two passes
    [
        ("cg", lambda queries: 3 + 4 * queries),
        ("nystrom", lambda queries: 3 + 4 + 1),
        ("ekfac", lambda queries: 2),
        ("ekfac_cg", lambda queries: 2 + 4 * queries),
    ],
)
def test_the_number_of_products_is_known_before_they_are_computed(
    solver: str,
    products: Callable[[int], int],
    queries: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {} if solver == "ekfac" else {"max_iter": 4, "unconverged": "ignore"}
    trainer, _, data = fitted(callback=GIFCallback(solver=solver, snapshots=0, **options), enable_progress_bar=True)
    capsys.readouterr()
    monkeypatch.setattr(progress, "_LINES", 0.0)
    trainer.influence(batch_of(data, slice(queries)), per_example=True)
    lines = [line.split(";")[0] for line in capsys.readouterr().err.splitlines()]
    total = products(queries)
    assert [line for line in lines if line.startswith("Curvature")] == [
        f"Curvature: {count} of {total}" for count in range(1, total + 1)
    ]


def test_the_time_left_is_that_of_the_whole_call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "monotonic", lambda: now)

    def told(call: progress.Progress, stage: str, total: int | None, seconds: list[float]) -> list[str]:
        nonlocal now
        with call.stage(stage, total) as update:
            for each in seconds:
                now += each
                update()
        return capsys.readouterr().err.splitlines()

    call = progress.Progress(shown=True)
    call.expect(("solve", 30.0), ("score", 10.0), ("solve", 30.0), ("score", 10.0))
    # 3 units of work in 10 s. The pace is the median: the pause of 100 s in the middle is not expected again.
    assert told(call, "solve", 10, [10, 10, 100])[0] == (
        f"solve: 1 of 10; 10 s so far, about {progress.duration(90 + 100 / 3 + 100 + 100 / 3)} left"
    )
    # The solve took 120 s, and will take as long again.
    assert told(call, "score", 2, [20, 20]) == [
        f"score: 1 of 2; 2 min so far, about {progress.duration(20 + 120 + 40)} left",
        f"score: 2 of 2; 3 min so far, about {progress.duration(120 + 40)} left",
    ]
    assert told(call, "solve", 10, [30])[0].endswith(f"about {progress.duration(90 + 40)} left")
    assert told(call, "score", 2, [20])[0].endswith("about 20 s left")
    unknown = progress.Progress(shown=True)
    assert told(unknown, "solve", None, [10, 10]) == ["solve: 1; 10 s so far", "solve: 2; 20 s so far"]
    unknown.expect(("solve", None), ("score", 1.0))
    assert told(unknown, "solve", 3, [10]) == ["solve: 1 of 3; 30 s so far"]
    # Nothing is said about the rest of the call in a stage that nobody announced, and after it.
    assert told(unknown, "another", 2, [10]) == ["another: 1 of 2; 40 s so far"]
    assert told(unknown, "score", 2, [10]) == ["score: 1 of 2; 50 s so far"]
    # What a stage does after its last update will take as long again, too.
    whole = progress.Progress(shown=True)
    whole.expect(("solve", None), ("solve", None))
    with whole.stage("solve", 1) as update:
        update()
        now += 50
    assert told(whole, "solve", 1, [20]) == ["solve: 1 of 1; 70 s so far, about 30 s left"]
    longer = progress.Progress(shown=True)
    longer.expect(("solve", 1.0))
    assert told(longer, "solve", 1, [10, 10])[1] == "solve: 2; 20 s so far"

    # Changes of an edit: how many are needed is not known, but the most of them is.
    edit = progress.Progress(shown=True)
    edit.expect(("first", 1.0), ("second", 1.0), ("third", 1.0), at_most=True)
    assert told(edit, "first", None, [20]) == ["first: 1; 20 s so far"]
    assert told(edit, "second", None, [12, 13]) == [
        "second: 1; 32 s so far, at most 28 s left",
        "second: 2; 45 s so far",
    ]
    assert told(edit, "third", None, [10]) == ["third: 1; 55 s so far, at most 15 s left"]
    hidden = progress.Progress(shown=False)
    assert told(hidden, "solve", 3, [10, 10]) == []
