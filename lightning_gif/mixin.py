"""The optional contract of a LightningModule with the influence computations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["GIFMixin"]


class GIFMixin:
    """What a LightningModule may say about itself. All three methods are optional; override what you need.

    Without this class the per-example losses are derived from ``training_step``, one example at a time. Override
    :meth:`influence_loss` where that cannot work (manual optimisation, losses that couple the examples of a batch,
    Python code that depends on values), or to be faster and explicit.

    The methods are called with the module in evaluation mode (dropout off, normalisation by running statistics), with
    parameters and buffers replaced by tensors of the computation, and possibly under ``torch.func`` transforms: use
    ``self`` as in ``forward``, and change nothing on it.

    Example::

        class Classifier(GIFMixin, LightningModule):
            def influence_loss(self, batch):
                x, y = batch
                return F.cross_entropy(self(x), y, reduction="none")

            def influence_measurement(self, batch):  # ask about the margin instead of the loss
                x, y = batch
                logits = self(x)
                correct = logits.gather(1, y[:, None]).squeeze(1)
                return correct - logits.scatter(1, y[:, None], -torch.inf).logsumexp(1)

            def influence_parameters(self):  # change the head only
                return ["head.*"]
    """

    def influence_loss(self, batch: Any) -> Tensor:
        """The training loss of each example, ``(B,)``, whose mean over the training set was minimised.

        Raises:
            NotImplementedError: By default, which stands for "derive it from ``training_step``".
        """
        raise NotImplementedError(f"{type(self).__name__} does not override influence_loss")

    def influence_measurement(self, batch: Any) -> Tensor:
        """What a query measures on each of its examples, ``(B,)``; scores are in its unit. By default the loss."""
        return self.influence_loss(batch)

    def influence_parameters(self) -> Sequence[str]:
        """Names or patterns (``*``, ``?``) of the parameters that may be changed; by default all trainable ones."""
        return ["*"]


def overrides(module: object, name: str) -> bool:
    """Whether ``module`` brings its own method of that name, with or without the mixin among its classes."""
    method = getattr(type(module), name, None)
    return method is not None and method is not getattr(GIFMixin, name)
