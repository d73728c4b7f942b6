"""Whether an edit worked: the line in its report, for each goal."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_gif import GIFWarning, UnlearnReport
from lightning_gif.unlearning.goals import GOALS
from lightning_gif.unlearning.outcomes import Outcome, auroc_change, wilson_interval
from lightning_gif.unlearning.verdict import Evidence, Grade, Verdict

from ..conftest import batch_of, blobs, fitted, loader
from ..nets import Regressor


def losses(before: Any, after: Any, **more: Any) -> Outcome:
    parts = {"labels": None, "predicted_before": None, "predicted_after": None, **more}
    at = {"before": before, "after": after}
    return Outcome(**{name: torch.as_tensor(value).double() for name, value in at.items()}, **parts)


def judged(goal: str, outcomes: dict[str, Outcome], predicted: dict[str, float] | None = None) -> Verdict:
    found = GOALS[goal]().verdict(Evidence(outcomes, predicted or {}))
    assert found is not None
    return found


def classes(n: int, before: int, after: int) -> Outcome:
    """Examples of class 1, of which some are predicted as it, and all others as class 0."""
    places, labels = torch.arange(n), torch.ones(n, dtype=torch.long)
    return losses(
        torch.ones(n),
        torch.ones(n),
        labels=labels,
        predicted_before=(places < before).long(),
        predicted_after=(places < after).long(),
    )


@pytest.mark.parametrize(
    ("n", "before", "after", "grade"),
    [
        (137, 137, 0, Grade.DONE),
        (137, 137, 1, Grade.DONE),  # one of 137 may be chance: the target is 0.5 %
        (137, 137, 40, Grade.PARTLY),
        (137, 137, 136, Grade.NOT_DONE),
        (137, 137, 137, Grade.NOT_DONE),
        (137, 0, 0, Grade.NOTHING_TO_DO),
        (2, 2, 1, Grade.NOT_DONE),
    ],
)
def test_a_class_is_forgotten_if_hardly_an_example_is_predicted_as_it(
    n: int, before: int, after: int, grade: Grade
) -> None:
    found = judged("class", {"forget": classes(n, before, after)})
    assert found.grade is grade
    assert f"{after} of {n} examples of the class are still predicted as it (before the edit: {before})." in str(found)
    low, high = stats.binomtest(after, n).proportion_ci(0.95, method="wilson")
    assert f"{100 * low:.1f} % to {100 * high:.1f} %." in str(found)
    assert wilson_interval(after, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("after", "grade"), [(20, Grade.DONE), (16, Grade.DONE), (14, Grade.PARTLY), (0, Grade.NOT_DONE)]
)
def test_labels_are_corrected_if_most_are_predicted(after: int, grade: Grade) -> None:
    found = judged("labels", {"relabelled": classes(20, 0, after)})
    assert found.grade is grade
    assert f"{20 - after} of 20 corrected examples are not predicted as their new label" in str(found)


def test_labels_of_a_model_without_classes_are_corrected_if_their_loss_is_like_that_of_others() -> None:
    retain = losses([0.5, 0.5], [0.5, 0.5])
    for after, grade in ((0.4, Grade.DONE), (0.6, Grade.DONE), (1.0, Grade.PARTLY), (1.4, Grade.NOT_DONE)):
        assert judged("labels", {"relabelled": losses([1.5] * 3, [after] * 3), "retain": retain}).grade is grade
    assert judged("labels", {"relabelled": losses([0.2], [0.1]), "retain": retain}).grade is Grade.NOTHING_TO_DO


@pytest.mark.parametrize(
    ("after", "grade"),
    [(1.5, Grade.DONE), (1.0, Grade.PARTLY), (0.6, Grade.NOT_DONE), (3.0, Grade.TOO_FAR)],
)
def test_a_predicted_loss_is_compared_with_its_uncertainty(after: float, grade: Grade) -> None:
    spread = torch.tensor([-0.1, 0.0, 0.1])
    found = judged("examples", {"forget": losses([0.5] * 3, after + spread)}, {"forget": 1.5})
    assert found.grade is grade
    half = 1.96 * 0.1 / math.sqrt(3)
    assert f": {100 * (after - 0.5):.0f} ± {100 * half:.0f} % of the predicted change." in str(found)
    alone = judged("examples", {"forget": losses([0.5], [after])}, {"forget": 1.5})
    assert f": {100 * (after - 0.5):.0f} % of the predicted change. For a single example, the uncert" in str(alone)
    wide = judged("examples", {"forget": losses([0.5] * 3, after + 10 * spread)}, {"forget": 1.5})
    assert wide.grade is grade  # that of the mean, which is a fact about these examples
    low, high = (100 * (after - 0.5 + sign * 10 * half) for sign in (-1, 1))
    assert " as a mean over 3 examples. Their changes differ much: " in str(wide)
    assert f"the mean would be between {low:.0f} % and {high:.0f} % (95 % interval)." in str(wide)
    unaffected = judged("examples", {"forget": losses([0.5], [0.5])}, {"forget": 0.51})
    assert unaffected.grade is Grade.NOTHING_TO_DO
    for verdict in (found, alone, wide, unaffected):  # whatever the grade: a prediction is no retraining
        assert str(verdict).endswith(" This compares the edit with a prediction, not with a retrained model.")
    assert judged("examples", {"forget": losses([0.5], [0.5])}, {"forget": math.nan}).grade is Grade.UNKNOWN


def membership(before: Tensor, after: Tensor, unseen: Tensor) -> Verdict:
    return judged("examples", {"forget": losses(before, after), "unseen": losses(unseen, unseen)})


def test_a_comparison_with_unseen_examples_has_a_tolerance() -> None:
    generator = torch.Generator().manual_seed(0)
    unseen, own = (torch.rand(200, generator=generator) for _ in range(2))
    noise = 0.01 * torch.rand(200, generator=generator)
    assert membership(own, own + noise, unseen).grade is Grade.NOTHING_TO_DO  # an AUROC near 0.5 before the edit
    missed = membership(own + 1, own + 1, unseen)  # examples with larger losses are not memorized
    assert missed.grade is Grade.NOTHING_TO_DO
    assert str(missed).endswith("Before the edit, the losses of the forget examples were already larger.")
    memorized = 0.3 * own
    assert membership(memorized, memorized, unseen).grade is Grade.NOT_DONE
    assert membership(memorized, own, unseen).grade is Grade.DONE
    assert membership(memorized, 0.6 * own, unseen).grade is Grade.PARTLY


@pytest.mark.slow
def test_the_uncertainty_of_an_auroc_is_that_over_new_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    values, errors, changes, change_errors = [], [], [], []
    for _ in range(400):
        own, unseen = torch.randn(40, generator=generator), 0.5 + torch.randn(60, generator=generator)
        after = own + 0.3 + 0.2 * torch.randn(40, generator=generator)
        first, _, moved = auroc_change(losses(own, after), losses(unseen, unseen))
        values.append(first.mean)
        errors.append(first.standard_error)
        changes.append(moved.mean)
        change_errors.append(moved.standard_error)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(values).std()), rel=0.15)
    assert torch.tensor(change_errors).mean() == pytest.approx(float(torch.tensor(changes).std()), rel=0.15)


def test_without_unseen_examples_only_a_loss_that_hardly_changed_has_a_verdict() -> None:
    assert judged("examples", {"forget": losses([0.5, 0.6], [0.51, 0.61])}).grade is Grade.NOT_DONE
    moved = judged("examples", {"forget": losses([0.5, 0.6, 0.5], [1.5, 1.7, 1.6])})
    assert moved.grade is Grade.UNKNOWN
    assert "no unseen examples of their labels" in str(moved)


def test_the_loss_of_a_model_without_classes_is_small_or_large_beside_the_retained_loss() -> None:
    retain, forget = losses([0.02] * 3, [0.02] * 3), losses([0.02] * 3, [0.03] * 3)
    assert judged("examples", {"forget": forget, "retain": retain}, {"forget": 0.03}).grade is Grade.DONE
    known = losses([0.02] * 3, [0.02] * 3, predicted_before=torch.zeros(3, dtype=torch.long))
    assert judged("examples", {"forget": forget, "retain": known}, {"forget": 0.03}).grade is Grade.NOTHING_TO_DO


def test_each_edit_says_whether_it_worked_and_its_file_as_well(tmp_path: Path) -> None:
    trainer, _, dataset = fitted(max_epochs=30)
    labels = dataset.tensors[1]
    edits = {
        "class": trainer.unlearn(batch_of(dataset, labels == 1), dry_run=True),
        "labels": trainer.unlearn([3, 17, 30], relabel=torch.tensor([1, 0, 2]), dry_run=True),
        "examples": trainer.unlearn([3, 17], dry_run=True),
        "natural": trainer.unlearn([3, 17], step="natural", dry_run=True),
    }
    for name, edit in edits.items():
        assert str(edit).splitlines()[1] == edit.verdict
        assert edit.verdict.partition(". ")[0] in {grade.value for grade in Grade}
        edit.save(tmp_path / name)
        loaded = UnlearnReport.load(tmp_path / name)
        assert loaded.verdict == edit.verdict
        assert loaded.digests() == edit.digests()
        for part, outcome in edit.outcomes.items():
            assert float(outcome.before.mean()) == edit.losses[part].before
            assert float(outcome.after.mean()) == edit.losses[part].after
            for key, value in outcome.tensors().items():
                assert torch.equal(loaded.outcomes[part].tensors()[key], value)
    share = (edits["class"].outcomes["forget"].predicted_after == 1).double().mean()
    assert float(share) == edits["class"].memorization[1]


def test_an_edit_that_hardly_moved_anything_warns_and_says_what_to_do() -> None:
    trainer, *_ = fitted(max_epochs=30)
    with pytest.warns(GIFWarning, match=r"Not done\. The loss of the forget examples was .* hardly a change\. Retrain"):
        report = trainer.unlearn([3, 17], step="relinearise", unseen=False, dry_run=True, selector=["net.0.bias"])
    assert report.notes[-1] != report.verdict
    assert any(note.startswith("Retrain without these examples") for note in report.notes)


def test_a_removal_with_nothing_to_hide_gives_no_warning() -> None:
    """The comparison with unseen examples is within its uncertainty before and after the edit."""
    trainer, *_ = fitted(dataset=blobs(200))
    with warnings.catch_warnings():
        warnings.simplefilter("error", GIFWarning)
        report = trainer.unlearn(
            list(range(0, 60)), step="relinearise", unseen=loader(blobs(200, seed=5)), dry_run=True
        )
    assert report.verdict.startswith("Nothing to do. A threshold on the loss tells forget from unseen examples with")
    assert not any("Retrain without" in note or "Undo" in note for note in report.notes)


def test_a_regression_has_a_verdict_for_removal_and_new_targets() -> None:
    trainer, *_ = fitted(Regressor(), TensorDataset(blobs().tensors[0], torch.rand(48)), max_epochs=20)
    removed = trainer.unlearn([3, 17], dry_run=True)
    assert removed.outcomes["forget"].predicted_after is None
    assert removed.outcomes["forget"].labels is None
    assert removed.verdict
    labels = torch.tensor([2.0, 3.0])
    matched = trainer.unlearn([3, 17], relabel=labels, dry_run=True)
    assert "The loss of the corrected examples with their new labels was " in matched.verdict
    lowered = trainer.unlearn([3, 17], relabel=labels, step="relinearise", dry_run=True)
    assert "The loss with the new labels went from" in lowered.verdict


@pytest.mark.parametrize(("rise", "grade"), [(0.0, Grade.DONE), (0.05, Grade.DONE), (0.2, Grade.TOO_FAR)])
def test_a_removal_that_raises_the_retained_loss_as_well_is_not_done(rise: float, grade: Grade) -> None:
    before = torch.linspace(0.01, 0.02, 40)
    outcomes = {"forget": losses(before, before + 0.22), "retain": losses(before, before + rise)}
    found = judged("examples", outcomes, {"forget": float(before.mean()) + 0.22, "retain": 0.3})
    assert found.grade is grade
    assert ("But the loss of the retained examples rose from 0.015 to 0.215" in str(found)) == (grade is Grade.TOO_FAR)
    assert "100 ± 0 % of the predicted change." in str(found)
