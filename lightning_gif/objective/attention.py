"""Where an image model looks: Grad-CAM, or the mean size of a feature map, of one layer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import ConfigurationError
from ..storage.interrupts import uninterrupted
from .objective import Objective

__all__ = ["attention_maps", "layer_for_maps"]


def layer_for_maps(module: nn.Module, name: str | None) -> str:
    """The name of a layer: the given one, or by default the last two-dimensional convolution.

    Raises:
        ConfigurationError: If there is no such layer.
    """
    layers = dict(module.named_modules())
    convolutions = [one for one, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    if name is None and convolutions:
        return convolutions[-1]
    if name is None:
        raise ConfigurationError(
            f"{type(module).__name__} has no Conv2d layer. Give the name of a layer whose output is a feature map (B,"
            " channels, height, width), or one vector for each patch of the image, (B, patches, channels)."
        )
    if name not in layers or not name:
        known = ", ".join(convolutions[-5:]) or ", ".join(list(layers)[-5:])
        raise ConfigurationError(
            f"There is no layer {name!r} in {type(module).__name__}. It has, for example: {known}."
        )
    return name


def attention_maps(
    objective: Objective, batch: Batch, layer: str, classes: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Where the model looks in each image of a batch, at the present state of the objective.

    With ``classes``, this is Grad-CAM (Selvaraju et al., ICCV 2017): the channels of the layer's output, each weighted
    by the mean gradient of the logit of the class with respect to it, are added up, and negative values become 0.
    Without them, it is the mean absolute value over the channels.

    Args:
        objective: An open objective.
        batch: A prepared batch of B images.
        layer: The name of a layer of the module.
        classes: The class of each example for Grad-CAM, ``(B,)``; ``None`` if the model is no classifier.

    Returns:
        The maps ``(B, h, w)`` on the CPU, at least 0, and the probabilities ``(B, C)`` of the classes; ``None`` for the
        latter without ``classes``.

    Raises:
        ConfigurationError: If the output of the layer is not one map for each example, or the logits do not depend on
            it.
    """
    seen: list[Tensor] = []
    theta = objective.theta.detach().requires_grad_()
    hooked = objective.module.get_submodule(layer)
    try:
        with uninterrupted():
            hook = hooked.register_forward_hook(lambda _, __, output: seen.append(output))
        if classes is None:
            objective.loss.evaluate(theta, batch)
        else:
            logits = objective.logits(theta, batch)
    finally:
        with uninterrupted():
            hook.remove()
    output = seen[-1] if seen else None
    maps = None if not isinstance(output, Tensor) else _as_maps(output)
    if output is None or maps is None or len(maps) != batch.size:
        raise ConfigurationError(
            f"The output of the layer {layer!r} is {list(output.shape) if isinstance(output, Tensor) else 'no tensor'},"
            f" not one feature map for each of {batch.size} examples: (B, channels, height, width), or one vector for"
            " each patch of a square image, (B, patches, channels). Give another layer."
        )
    if classes is None:
        return maps.abs().mean(1).detach().cpu(), None
    chosen = logits.gather(1, classes.to(logits.device)[:, None]).sum()
    (slope,) = torch.autograd.grad(chosen, output, allow_unused=True) if output.requires_grad else (None,)
    if slope is None:
        raise ConfigurationError(
            f"The predictions do not depend on the output of the layer {layer!r}. Give another layer."
        )
    slopes = _as_maps(slope)
    assert slopes is not None  # it has the shape of the output
    weights = slopes.mean((2, 3), keepdim=True)
    return F.relu((weights * maps).sum(1)).detach().cpu(), logits.detach().softmax(1).cpu()


def _as_maps(output: Tensor) -> Tensor | None:
    """A layer's output as maps ``(B, K, h, w)``; ``None`` if it has none.

    Vectors of patches may have one more before them, such as the class token of a vision transformer.
    """
    if output.ndim == 4:
        return output
    if output.ndim != 3:
        return None
    for first in (0, 1):
        side = math.isqrt(output.shape[1] - first)
        if side > 1 and side * side == output.shape[1] - first:
            return output[:, first:].movedim(1, -1).unflatten(-1, (side, side))
    return None
