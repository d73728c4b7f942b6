"""How the report of an edit is printed and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_gif import ConfigurationError, EditError, GIFCallback, UnlearnReport
from lightning_gif.reporting.charts import percent

from ..conftest import Classifier, batch_of, blobs, fitted, loader, same_weights, weights
from ..nets import Regressor
from ..reports import axes_of, groups_of, image_net, images, titles, words


def test_print_of_an_edit_has_both_sides_and_the_notes() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="natural")
    text = str(report)
    assert f"Edit for 2 examples (goal: examples; 46 retained) by changing {report.edit.count} of 83" in text
    everything = trainer.unlearn(batch_of(dataset, [0, 1]), step="natural", method="if", dry_run=True)
    assert "by changing all 83 parameters with step size 1;" in str(everything)
    assert f"forget loss: {report.forget.before:.4g} -> {report.forget.after:.4g}" in text
    assert f"retain loss: {report.retain.before:.4g} -> {report.retain.after:.4g}" in text
    assert "note: The optimizer's state" in text
    corrected = trainer.unlearn(batch_of(dataset, [2, 3]), relabel=0, step="natural")
    assert corrected.relabelled is not None
    assert f"relabelled loss: {corrected.relabelled.before:.4g}" in str(corrected)


def test_a_plot_of_an_edit_shows_the_search_and_the_solve() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, [0, 1]), step="search")
    search, solve = report.plot("trials").axes
    assert search.get_title() == "losses along the change, goal: examples"
    assert solve.get_title() == f"first solve: 'lsmr' ({report.solve['iterations']} iterations)"
    forget, forget_after, retain, retain_after, _, chosen = search.lines
    assert forget_after.get_ydata()[0] == report.forget.after
    assert retain_after.get_ydata()[0] == report.retain.after
    assert forget.get_label() == "forget"
    steps = sorted(trial.step_size for trial in report.trials)
    assert forget.get_xdata().tolist() == steps == retain.get_xdata().tolist()
    assert chosen.get_xdata()[0] == report.step
    assert solve.lines[0].get_ydata().tolist() == report.residuals
    assert search.get_yscale() == "log"


def test_a_plot_of_several_changes_shows_the_losses_after_each() -> None:
    trainer, _, dataset = fitted()
    report = trainer.unlearn(batch_of(dataset, dataset.tensors[1] == 1))
    assert len(report.step_sizes) > 1
    losses, memory, _ = report.plot("trials").axes
    assert memory.get_title() == "still predicted as the class"
    path, end = memory.lines
    assert path.get_ydata()[0] == report.memorization[0] == report.trials[0].memorization
    assert path.get_xdata().tolist() == list(range(len(report.step_sizes) + 1))
    assert end.get_ydata()[0] == report.memorization[1]
    forget, forget_after, *_ = losses.lines
    assert forget.get_xdata().tolist() == list(range(len(report.step_sizes) + 1))
    assert forget.get_ydata()[0] == pytest.approx(report.forget.before, rel=1e-6)
    assert forget.get_ydata()[-1] == pytest.approx(report.forget.after, rel=1e-3)
    assert forget_after.get_xdata()[0] == len(report.step_sizes)


def test_losses_that_are_not_positive_are_drawn_on_a_plain_scale() -> None:
    class Shifted(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) - 5.0

    trainer, _, dataset = fitted(Shifted())
    search = trainer.unlearn(batch_of(dataset, [0, 1]), step=0.5).plot("trials").axes[0]
    assert search.get_yscale() == "linear"
    low, high = search.get_ylim()
    assert low < high < 0


# ----------------------------------------------------------------------------------------------------------------------
# What was forgotten
# ----------------------------------------------------------------------------------------------------------------------


def accuracies(net: nn.Module, x: Tensor, y: Tensor) -> list[float]:
    with torch.no_grad():
        right = net(x).argmax(1) == y
    return [float(right[y == label].double().mean()) for label in range(3)]


def test_the_plot_of_a_class_removal_shows_what_was_forgotten_and_each_class_before_and_after() -> None:
    x, y = images(60).tensors
    x[torch.arange(60), 0, y] += 2  # a row of pixels shows the class
    callback = GIFCallback(ratio=0.5, unconverged="ignore", class_names=["ant", "bee", "$cat_"])
    trainer, module, _ = fitted(image_net(), TensorDataset(x, y), callback, max_epochs=20)
    unseen = loader(TensorDataset(x + 0.1, y))
    before = accuracies(module, x, y)
    report = trainer.unlearn(lambda batch: batch[1] == 1, unseen=unseen)
    after, of_unseen = accuracies(module, x, y), accuracies(module, x + 0.1, y)
    figure = report.plot()
    assert figure.get_suptitle() == f"Forget 20 examples, all of class bee: {report.verdict.partition('.')[0].lower()}"
    assert titles(figure)[:2] == ["#1 bee", "#4 bee"]
    assert sum(len(axes.images) for axes in figure.axes) == 8
    names = ["ant", "bee (forgotten)", "$cat_"]
    groups = groups_of(axes_of(figure, "Predicted as their label, by class"))
    assert groups == {
        "before": dict(zip(names, map(pytest.approx, before), strict=True)),
        "after": dict(zip(names, map(pytest.approx, after), strict=True)),
        "unseen examples, after": dict(zip(names, map(pytest.approx, of_unseen), strict=True)),
    }
    losses = groups_of(axes_of(figure, "Mean loss"))
    assert losses["before"] == {"forget examples": report.forget.before, "retained examples": report.retain.before}
    assert losses["after"] == {"forget examples": report.forget.after, "retained examples": report.retain.after}
    assert report.verdict in [text.replace("\n", " ") for text in words(figure)]


def test_the_pictures_of_forget_examples_are_not_in_the_file_of_an_edit(tmp_path: Path) -> None:
    trainer, *_ = fitted(image_net(), images())
    report = trainer.unlearn([4, 7], dry_run=True)
    assert titles(report.plot())[:2] == ["#4 label 1", "#7 label 1"]
    report.save(tmp_path / "edit")
    loaded = UnlearnReport.load(tmp_path / "edit").plot()
    assert titles(loaded) == ["Predicted as their label, by class", "Mean loss"]
    assert groups_of(loaded.axes[1]) == groups_of(report.plot().axes[-1])


def test_a_name_with_dollar_signs_is_drawn_as_it_is(tmp_path: Path) -> None:
    callback = GIFCallback(ratio=0.5, unconverged="ignore", class_names=[r"$\undefined$", "dog", "bird"])
    trainer, _, dataset = fitted(image_net(), images(), callback=callback)
    edit = trainer.unlearn((dataset.tensors[1] == 0).nonzero().flatten().tolist(), step="natural", dry_run=True)
    file = tmp_path / "edit.png"
    assert r"all of class $\undefined$" in edit.plot(path=file).get_suptitle()  # TeX would not accept it
    assert file.exists()


def test_the_plot_of_a_regression_has_the_losses_alone() -> None:
    trainer, *_ = fitted(Regressor(), TensorDataset(blobs().tensors[0], torch.rand(48)))
    report = trainer.unlearn([3, 17], dry_run=True)
    figure = report.plot()
    assert titles(figure) == ["Mean loss"]
    predicted = groups_of(figure.axes[0])["predicted by theory"]
    assert predicted["forget examples"] == report.forget.predicted
    with pytest.raises(ConfigurationError, match="no classifier that the package recognises"):
        report.plot("predictions")


def test_of_many_classes_the_forgotten_and_the_changed_ones_are_drawn() -> None:
    x, y = blobs(300, classes=100).tensors
    trainer, *_ = fitted(Classifier(nn.Linear(6, 100)), TensorDataset(x, y), max_epochs=20)
    report = trainer.unlearn(lambda batch: batch[1] == 42, dry_run=True)
    for axes in (report.plot().axes[0], report.plot("predictions").axes[0]):
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert len(names) <= 13
    names = [label.get_text() for label in report.plot().axes[0].get_yticklabels()]
    assert "42 (forgotten)" in names
    assert names[-1] == "… 88 more"


# ----------------------------------------------------------------------------------------------------------------------
# As what they are predicted, and where the model looks
# ----------------------------------------------------------------------------------------------------------------------


def shares_of(net: nn.Module, x: Tensor) -> dict[str, float]:
    with torch.no_grad():
        counts = torch.bincount(net(x).argmax(1), minlength=3).double() / len(x)
    return {str(label): share for label, share in enumerate(counts.tolist())}


def marked(name: str) -> str:
    """The name of a class in a picture of an edit that forgets class 1."""
    return f"{name} (forgotten)" if name == "1" else name


def test_the_predictions_of_forget_examples_are_drawn_beside_those_of_a_model_without_them() -> None:
    trainer, module, dataset = fitted(max_epochs=20)
    x, y = dataset.tensors
    _, retrained, _ = fitted(dataset=TensorDataset(x[y != 1], y[y != 1]), max_epochs=20)
    expected = {"before the edit (16)": shares_of(module, x[y == 1])}
    report = trainer.unlearn(lambda batch: batch[1] == 1)
    expected["after the edit (16)"] = shares_of(module, x[y == 1])
    expected["a model trained without them (16)"] = shares_of(retrained, x[y == 1])
    before, state = weights(module), torch.get_rng_state()
    figure = report.plot("predictions", reference=retrained)
    assert same_weights(weights(module), before)
    assert torch.equal(torch.get_rng_state(), state)
    (axes,) = figure.axes
    assert axes.get_title() == "Predicted classes of the forget examples"
    drawn = groups_of(axes)
    kept = {name for shares in expected.values() for name, share in shares.items() if share}
    assert drawn == {
        when: {marked(name): pytest.approx(shares[name]) for name in sorted(kept)} for when, shares in expected.items()
    }


def test_without_a_model_the_reference_are_unseen_examples_of_the_same_labels() -> None:
    trainer, module, _ = fitted(max_epochs=20)
    x, y = blobs(60, seed=5).tensors
    report = trainer.unlearn(lambda batch: batch[1] == 1, unseen=loader(TensorDataset(x, y)))
    drawn = groups_of(report.plot("predictions").axes[0])
    assert drawn["unseen examples of the same labels (20)"] == {
        marked(name): pytest.approx(share)
        for name, share in shares_of(module, x[y == 1]).items()
        if marked(name) in drawn["before the edit (16)"]
    }
    assert len(groups_of(trainer.unlearn([2], dry_run=True, unseen=False).plot("predictions").axes[0])) == 2


def convolutional() -> Classifier:
    return Classifier(
        nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU()),
            *(nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 36, 3)),
        )
    )  # fmt: skip


@pytest.mark.mostly_slow(1)
@pytest.mark.parametrize("applied", [True, False])
def test_where_a_model_looks_is_grad_cam_with_both_weights_and_leaves_no_trace(applied: bool) -> None:
    trainer, module, dataset = fitted(convolutional(), images(), max_epochs=5)
    net: Any = module.net
    report = trainer.unlearn([4, 7, 9], dry_run=True)
    expected = []
    for edited in (False, True):
        if edited:
            report.apply()
        module.eval()
        features = net[:5](dataset.tensors[0][4:5]).detach().requires_grad_()
        (slope,) = torch.autograd.grad(net[5:](features)[0, 1], features)
        expected.append((slope.mean((2, 3), keepdim=True) * features).sum(1).relu()[0].detach())
    if not applied:
        report.undo()
    module.train()
    before, state = weights(module), torch.get_rng_state()
    figure = report.plot("attention", count=2)
    assert same_weights(weights(module), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(one.training and not one._forward_hooks for one in module.modules())
    assert figure.get_suptitle() == "Where the model looks: Grad-CAM for the label, layer net.4"
    assert len(figure.axes) == 3 * 4
    assert "#4 label 1" in titles(figure)
    top = max(float(one.max()) for one in expected)
    columns = {axes.get_title(): number for number, axes in enumerate(figure.axes)}
    first = columns["#4 label 1"]
    for row, heat in zip((1, 2), expected, strict=True):
        drawn = figure.axes[first + 2 * row].images[1].get_array()
        wanted = torch.nn.functional.interpolate(heat[None, None], (8, 8), mode="bilinear")[0, 0] / top
        torch.testing.assert_close(torch.tensor(drawn), wanted, rtol=1e-3, atol=1e-4)
    assert report.plot("attention", layer="net.0", count=1).get_suptitle().endswith("layer net.0")
    few = report.plot("attention")  # three forget examples in four columns
    assert len([title for title in titles(few) if title.startswith("#")]) == 3 + 4


def test_where_a_model_without_classes_looks_is_the_size_of_its_feature_maps() -> None:
    x = 0.3 * images().tensors[0]
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 1))
    trainer, *_ = fitted(Regressor(net), TensorDataset(x, torch.rand(24)))
    figure = trainer.unlearn([4], dry_run=True).plot("attention", count=1)
    assert figure.get_suptitle() == "Where the model looks: mean size of the feature maps, layer net.0"
    heat = net[0](x[4:5])[0].abs().mean(0).detach()
    drawn = next(axes for axes in figure.axes if axes.get_ylabel() == "before").images[1].get_array()
    wanted = torch.nn.functional.interpolate(heat[None, None], (8, 8), mode="bilinear")[0, 0]
    assert torch.corrcoef(torch.stack([torch.tensor(drawn).flatten(), wanted.flatten()]))[0, 1] > 0.999


def test_a_layer_may_have_one_vector_for_each_patch_and_one_more() -> None:
    class Patches(nn.Module):
        """Four patches of an image, each embedded, with a class token before them."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, 5, 4, stride=4)
            self.token = nn.Parameter(torch.randn(1, 1, 5))
            self.mix = nn.Linear(5, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            patches = self.embed(x).flatten(2).movedim(1, 2)
            mixed = self.mix(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))
            return self.head(mixed.tanh().mean(1))

    trainer, module, dataset = fitted(Classifier(Patches()), images(), max_epochs=5)
    net: Any = module.net
    report = trainer.unlearn([4], dry_run=True)
    figure = report.plot("attention", layer="net.mix", count=1)
    seen: list[Tensor] = []
    hook = net.mix.register_forward_hook(lambda _, __, output: seen.append(output))
    logits = net(dataset.tensors[0][4:5])
    hook.remove()
    (slope,) = torch.autograd.grad(logits[0, 1], seen[0])
    maps, slopes = (part[0, 1:].detach().T.reshape(5, 2, 2) for part in (seen[0], slope))
    heat = (slopes.mean((1, 2), keepdim=True) * maps).sum(0).relu()
    wanted = torch.nn.functional.interpolate(heat[None, None], (8, 8), mode="bilinear")[0, 0]
    drawn = torch.tensor(next(axes for axes in figure.axes if axes.get_ylabel() == "before").images[1].get_array())
    torch.testing.assert_close(drawn * wanted.max(), wanted * drawn.max(), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    trainer, module, _ = fitted(convolutional(), images())
    report = trainer.unlearn([4, 7], step="natural")
    with pytest.raises(ConfigurationError, match=r"one of 'summary', .* got 'losses'\. To save a plot"):
        report.plot("losses")
    with pytest.raises(ConfigurationError, match=r"one of 'summary', .* got 3\. To save a plot"):
        report.plot(3)  # type: ignore[arg-type]
    report.plot(str(tmp_path / "a.png"))
    report.plot("trials", path=tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    with pytest.raises(ConfigurationError, match=r"no layer 'net.9' in Classifier\. It has, for example: net.0, net.4"):
        report.plot("attention", layer="net.9")
    with pytest.raises(ConfigurationError, match=r"output of the layer 'net.6' is \[2, 3\], not one feature map"):
        report.plot("attention", layer="net.6")
    with pytest.raises(ConfigurationError, match=r"`layer` is for plot\('attention'\), but this is plot\('trials'\)"):
        report.plot("trials", layer="net.0")
    report.save(tmp_path / "edit")
    with pytest.raises(EditError, match="loaded from a file, so the model cannot be evaluated"):
        UnlearnReport.load(tmp_path / "edit", module).plot("attention")
    with torch.no_grad():
        module.net[0].weight += 1
    with pytest.raises(EditError, match="The weights have changed since the edit was computed"):
        report.plot("attention")
    points, *_ = fitted()
    edit = points.unlearn([4], step="natural")
    with pytest.raises(ConfigurationError, match="Classifier has no Conv2d layer"):
        edit.plot("attention")
    with pytest.raises(ConfigurationError, match="is for images, but these examples are not"):
        edit.plot("attention", layer="net.0")


def test_percentages_are_not_rounded_to_certainty() -> None:
    assert [percent(share) for share in (0.0, 1e-7, 0.0004, 0.5, 0.9995, 1 - 1e-7, 1.0)] == [
        "0 %", "< 0.01 %", "0.04 %", "50.0 %", "99.95 %", "> 99.99 %", "100 %",
    ]  # fmt: skip
