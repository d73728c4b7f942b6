"""The labels that a classifier predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.examples import Examples
from ..errors import GIFError
from .objective import Objective

__all__ = ["predicted_labels"]


def predicted_labels(objective: Objective, examples: Examples, theta: Tensor) -> Tensor | None:
    """The predicted label of each example, ``(n,)`` on the CPU; ``None`` if the model is not known to predict labels.

    All processes must make the same call.

    Args:
        objective: An open objective.
        examples: The examples.
        theta: The parameters ``(p,)``.
    """
    found: list[Tensor] | None = None
    try:
        if examples.divisible and objective.n_classes(examples) is not None:  # else rows of a batch are no examples
            with torch.no_grad():
                found = [objective.logits(theta, batch).argmax(1) for batch in examples.local_batches()]
    except GIFError:  # some batches have no cross-entropy over classes
        found = None
    if not all(objective.processes.gather(found is not None)):
        return None
    assert found is not None
    return examples.all_gather(found).cpu()
