"""Optional methods by which a LightningModule defines its losses, its measurement and its editable parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .errors import ConfigurationError

__all__ = ["GIFMixin", "LossOfModule", "check_loss_of_module", "overrides"]


LossOfModule = Callable[[Any, Any], Tensor]
"""``(module, batch) -> (B,)``: the training loss of each example of a batch, see :meth:`GIFMixin.influence_loss`."""


class GIFMixin:
    """Three optional methods of a LightningModule. Override only those that you need.

    Without them, the loss of an example is the loss that ``training_step`` returns for a batch of this one example.
    Override :meth:`influence_loss` if that does not work: with manual optimization, or with losses that couple the
    examples of a batch. Override it also for speed, if a warning says that examples are evaluated one after the other.
    For a class that you cannot change, pass a function: ``GIFCallback(influence_loss=…)``.

    The methods are called with the module in evaluation mode: dropout is off, and normalisation uses running
    statistics. Parameters and buffers can be replaced by other tensors, also under ``torch.func`` transforms. So use
    ``self`` as in ``forward``, and assign nothing to it.

    Example::

        class Classifier(GIFMixin, LightningModule):
            def influence_loss(self, batch):
                x, y = batch
                return F.cross_entropy(self(x), y, reduction="none")

            def influence_measurement(self, batch):  # the negative margin instead of the loss
                x, y = batch
                logits = self(x)
                correct = logits.gather(1, y[:, None]).squeeze(1)
                return logits.scatter(1, y[:, None], -torch.inf).logsumexp(1) - correct

            def influence_parameters(self):  # edits may change the head only
                return ["head.*"]
    """

    def influence_loss(self, batch: Any) -> Tensor:
        """The training loss of each example. Its mean over the training set must be what training minimised.

        Args:
            batch: A batch of B examples, as the training loader yields them, on the module's device.

        Returns:
            The losses, ``(B,)``.

        Raises:
            NotImplementedError: If it is not overridden. Losses are then derived from ``training_step``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override influence_loss")

    def influence_measurement(self, batch: Any) -> Tensor:
        """What a query measures on each of its examples, by default the loss. Scores are in its unit.

        Let it be lower for better predictions. Then proponents and opponents mean the same as for the loss.

        Args:
            batch: A batch of B examples, as in :meth:`influence_loss`.

        Returns:
            The measurements, ``(B,)``.
        """
        return self.influence_loss(batch)

    def influence_parameters(self) -> Sequence[str]:
        """The parameters that may become targets, as names or patterns (``*``, ``?``); by default all trainable ones.

        Frozen parameters are never changed, even if a pattern matches them.
        """
        return ["*"]


def overrides(module: object, name: str) -> bool:
    """Whether ``module`` defines the method, in its class or on the instance, with or without the mixin as a base."""
    if name in vars(module):
        return True
    method = getattr(type(module), name, None)
    return method is not None and method is not getattr(GIFMixin, name)


def check_loss_of_module(given: Any) -> None:
    """Checks the ``influence_loss`` of a callback.

    Raises:
        ConfigurationError: If it is neither ``None`` nor a function that can be called with a module and a batch.
    """
    if given is None:
        return
    try:
        inspect.signature(given).bind("module", "batch")
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            "`influence_loss` must be a function (module, batch) -> (B,) that returns one loss for each example, got"
            f" {given!r}: {error}. For example: lambda module, batch: F.cross_entropy(module(batch[0]), batch[1],"
            " reduction='none')."
        ) from error
