"""Where an image model looks before and after an edit. The model is evaluated with both weights, and not changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attribution.report import first_shown
from ..data.examples import Examples
from ..errors import ConfigurationError, EditError
from ..objective.attention import attention_maps, layer_for_maps
from ..objective.labels import predicted_labels
from ..objective.objective import Objective
from ..objective.shadow import ModelState
from ..parameters import tensors_of
from ..reporting.charts import named, percent
from ..reporting.previews import Shown, empty_figure, show
from .record import EditRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_attention", "predictions_of"]


class _Looked(NamedTuple):
    """Where the model looks in some images, with one state of its weights.

    Attributes:
        maps: The maps ``(m, h, w)``.
        probabilities: The probabilities ``(m, C)`` of the classes; ``None`` for a model that is no classifier.
    """

    maps: Tensor
    probabilities: Tensor | None


def draw_attention(record: EditRecord, layer: str | None, count: int) -> Figure:
    """Draws where the model looks in some forget and some retained examples, before and after the edit.

    Args:
        record: The report of the edit.
        layer: The name of a layer; by default the last two-dimensional convolution.
        count: How many examples of each kind are drawn.

    Raises:
        ConfigurationError: If there is no such layer, or it has no feature maps; or if the examples are no images.
        EditError: If the report was loaded from a file, or the weights have changed since the edit was computed.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    drawn = empty_figure(1.35 * 2 * count + 0.7, 4.9)
    with _reopened(record)() as (objective, train):
        layer = layer_for_maps(objective.module, layer)
        parts = [_some(part, count) for part in _forget_and_retained(record, train)]
        shown = [first_shown(part, count) for part in parts]
        if any(one.image is None for some in shown for one in some):
            raise ConfigurationError(
                "plot('attention') is for images, but these examples are not: an image has the shape (H, W), (1, H, W),"
                " (3, H, W) or (H, W, 3) with sides of at least 6."
            )
        states = [state_of_edit(record, objective, edited=edited) for edited in (False, True)]
        looked = [[_look(objective, part, layer, state) for state in states] for part in parts]
    kind = "Grad-CAM for the label" if looked[0][0].probabilities is not None else "mean size of the feature maps"
    drawn.suptitle(f"Where the model looks: {kind}, layer {layer}", fontsize=12, fontweight="bold", parse_math=False)
    halves = drawn.subfigures(1, 2, squeeze=False)[0]
    for half, title, examples, both, part in zip(
        halves, ("Forget examples", "Retained examples"), shown, looked, parts, strict=True
    ):
        half.suptitle(title, fontsize=10)
        axes = half.subplots(3, count, squeeze=False)
        for axis in axes[:, len(examples) :].flat:
            axis.set_axis_off()
        for column in range(len(examples)):
            _draw_column([row[column] for row in axes], record, int(part.ids[column]), examples[column], both, column)
        if half is halves[0]:
            for row, name in zip(axes, ("image", "before", "after"), strict=True):
                row[0].set_ylabel(name, fontsize=9)
    classifies = looked[0][0].probabilities is not None
    halves[0].supxlabel(
        "Bright: what speaks for the label. Above: the predicted class." if classifies else "Bright: large features.",
        fontsize=8,
    )
    halves[1].supxlabel("Each pair of maps has one scale.", fontsize=8)
    return drawn


def predictions_of(record: EditRecord, model: object) -> Tensor:
    """The classes ``(m,)`` that another model of the same architecture predicts for the forget examples.

    Raises:
        ConfigurationError: If the model has other parameters, or is no classifier.
        EditError: If the report was loaded from a file.
    """
    with _reopened(record)() as (objective, train):
        forget, _ = _forget_and_retained(record, train)
        with objective.at_state(objective.state_of(model)):  # type: ignore[arg-type]
            found = predicted_labels(objective, forget, objective.theta)
        if found is None:
            raise ConfigurationError("The classes that the model predicts are not known, so there are none to compare.")
        return found


def state_of_edit(record: EditRecord, objective: Objective, *, edited: bool) -> ModelState:
    """The model's state before or after the edit.

    Raises:
        EditError: If the weights have changed since the edit was computed.
    """
    module = objective.module
    if record.edit.is_in(module) is None:
        raise EditError(
            "The weights have changed since the edit was computed, so they cannot be compared with those before it."
            " Undo later edits first, or load the weights for which the edit was computed."
        )
    return objective.model_state({**tensors_of(module), **record.edit.tensors(module, edited=edited)})


def _reopened(record: EditRecord) -> Callable[[], AbstractContextManager[tuple[Objective, Examples]]]:
    if record.context.reopen is None:
        raise EditError(
            "The report was loaded from a file, so the model cannot be evaluated. Draw this picture with the report"
            " that trainer.unlearn returned."
        )
    return record.context.reopen


def _forget_and_retained(record: EditRecord, train: Examples) -> tuple[Examples, Examples]:
    """The forget examples in the training data, and the others."""
    is_forget = torch.isin(train.ids, torch.tensor(record.data["indices"]))
    return tuple(train.subset(mask.nonzero().squeeze(1)) for mask in (is_forget, ~is_forget))  # type: ignore[return-value]


def _some(examples: Examples, count: int) -> Examples:
    """Up to ``count`` examples, spread evenly."""
    places = torch.linspace(0, len(examples) - 1, min(count, len(examples))).round().long().unique()
    return examples.subset(places)


def _look(objective: Objective, examples: Examples, layer: str, state: ModelState) -> _Looked:
    classes = None if objective.n_classes(examples) is None else examples.classes
    with objective.at_state(state):
        found = [
            attention_maps(objective, batch, layer, None if classes is None else batch.classes)
            for batch in examples.batches()
        ]
    maps, probabilities = zip(*found, strict=True)
    return _Looked(torch.cat(maps), None if classes is None else torch.cat(probabilities))


def _draw_column(
    axes: list[Axes], record: EditRecord, index: int, shown: Shown, both: list[_Looked], column: int
) -> None:
    """Draws an image, and where the model looks in it before and after the edit, on one scale for both."""
    label = "" if shown.label is None else named(shown.label, record.context.class_names)
    show(axes[0], shown, f"#{index} {f'label {label}' if label == str(shown.label) else label}")
    top = max(float(one.maps[column].max()) for one in both) or 1.0
    assert shown.image is not None
    for axis, looked in zip(axes[1:], both, strict=True):
        title = ""
        if looked.probabilities is not None:
            best = int(looked.probabilities[column].argmax())
            title = f"{named(best, record.context.class_names)} ({percent(float(looked.probabilities[column, best]))})"
        show(axis, shown, title)
        size = list(shown.image.shape[:2])
        heat = F.interpolate(looked.maps[column][None, None], size, mode="bilinear", align_corners=False)[0, 0] / top
        axis.imshow(heat.numpy(), cmap="inferno", alpha=0.6, vmin=0.0, vmax=1.0)
