"""Which tokens of a text the loss depends on."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..storage.interrupts import uninterrupted
from .objective import Objective

__all__ = ["TokenEffects", "token_effects"]


class TokenEffects(NamedTuple):
    """The tokens of one text, and how its loss depends on each.

    Attributes:
        ids: The ids of the tokens, ``(L,)``.
        effects: The predicted change of the loss if the embedding of the token were 0, to first order: ``−∇ₑℓ·e``,
            ``(L,)`` in float64. Positive: without the token, the loss would be higher.
    """

    ids: Tensor
    effects: Tensor


def token_effects(objective: Objective, batch: Batch) -> list[TokenEffects] | None:
    """How the loss of each example of a batch depends on each of its tokens, at the present state of the objective.

    The tokens are what the first ``nn.Embedding`` of the module gets as ``(1, L)`` or ``(L, 1)`` whole numbers.

    Args:
        objective: An open objective.
        batch: A prepared batch, which is divisible.

    Returns:
        The effects for each example; ``None`` if the module embeds no tokens.
    """
    embeddings = [one for one in objective.module.modules() if isinstance(one, nn.Embedding)]
    if not embeddings or not batch.divisible:
        return None
    found = []
    for position in range(batch.size):
        one = _effects(objective, batch.slice(position, position + 1), embeddings)
        if one is None:
            return None
        found.append(one)
    return found


def _effects(objective: Objective, batch: Batch, embeddings: list[nn.Embedding]) -> TokenEffects | None:
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 2 and 1 in args[0].shape:
            seen.append((args[0], output))

    hooks = list[Any]()
    try:
        with uninterrupted():
            hooks += [one.register_forward_hook(note) for one in embeddings]
        loss = objective.loss.evaluate(objective.theta.detach().requires_grad_(), batch).sum()
    finally:
        with uninterrupted():
            for hook in hooks:
                hook.remove()
    if not seen or not seen[0][1].requires_grad:
        return None
    ids, output = seen[0]
    (slope,) = torch.autograd.grad(loss, output, allow_unused=True)
    if slope is None:
        return None
    effects = -(slope * output).sum(-1)
    return TokenEffects(ids.detach().flatten().cpu(), effects.detach().flatten().double().cpu())
