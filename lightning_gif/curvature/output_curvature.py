"""Random vectors whose covariance is the second derivative of losses in their predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..solvers.vectors import norms

__all__ = ["output_roots", "output_vectors"]

# With up to so many predictions of an example, the root of its second derivative is computed by its eigenvectors.
_WHOLE = 256

# With more, the root's product with a vector is computed by so many steps of the Lanczos method.
_STEPS = 32

# What is added to a diagonal before a triangular root, as a share of its mean.
_SHIFT = 1e-12

# The constants of SplitMix64, as signed numbers: the golden ratio, and the shifts and factors that mix bits.
_STEP_OF_64_BITS = 0x9E3779B97F4A7C15 - (1 << 64)
_MIXING = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))

# The largest relative difference between products that counts as rounding.
_ROUNDING = 1e-3


def output_vectors(
    loss_sum_at: Callable[[Tensor], Tensor], predictions: Tensor, ids: Tensor, *, count: int, seed: int
) -> Iterator[Tensor]:
    """Yields vectors ``v`` such that the mean of ``v vᵀ`` is the second derivative ``H`` of the losses in predictions.

    The gradients ``Jᵀv`` of the parameters then have the Gauss–Newton matrix ``JᵀHJ`` as their second moment. Each
    vector is ``H^(1/2) ξ``, where ``ξ`` has random signs. If there are as many vectors as an example has predictions,
    they are the columns of a root of ``H`` instead, and the mean is exact.

    Args:
        loss_sum_at: The sum of the losses as a function of the predictions. It must be convex.
        predictions: The predictions of a batch, of any shape with ``N`` entries.
        ids: A number for each example, ``(B,)``, that decides its signs. So they do not depend on the other examples.
        count: The largest number of vectors.
        seed: The seed of all signs.
    """
    size = len(ids)
    at, product = _second_derivative(loss_sum_at, predictions)
    root = _root(product, at, size)
    if root is not None and count >= root.shape[1]:
        for column in root.unbind(2):
            yield root.shape[1] ** 0.5 * column.reshape(at.shape)
        return
    for number in range(count):
        signs = _signs(ids, seed + number, at.numel(), at)
        if root is not None:
            yield (root @ signs.view(size, -1, 1)).reshape(at.shape)
        else:
            yield _root_product(product, signs).view_as(at)


def output_roots(loss_sum_at: Callable[[Tensor], Tensor], predictions: Tensor, size: int) -> Tensor | None:
    """Roots ``R`` of the second derivative ``H = R Rᵀ`` of the losses in the predictions of each example.

    Args:
        loss_sum_at: See :func:`output_vectors`.
        predictions: The predictions of ``B`` examples.
        size: ``B``.

    Returns:
        ``(B, d, d)``; ``None`` if an example has too many predictions, or if they do not lie side by side.
    """
    at, product = _second_derivative(loss_sum_at, predictions)
    return _root(product, at, size)


def _second_derivative(
    loss_sum_at: Callable[[Tensor], Tensor], predictions: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The predictions without their graph, and the product of the second derivative with a vector, in their shape."""
    at = predictions.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_sum_at(at), at, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        if not slope.requires_grad:  # a loss that is linear in its predictions
            return torch.zeros_like(at)
        return torch.autograd.grad(slope, at, vector.reshape(at.shape), retain_graph=True, materialize_grads=True)[0]

    return at, product


def _root(product: Callable[[Tensor], Tensor], at: Tensor, size: int) -> Tensor | None:
    """The root ``(B, d, d)`` of the second derivative of each example, if its ``d`` predictions lie side by side."""
    if at.numel() % size or not 0 < at.numel() // size <= _WHOLE:
        return None
    rows = at.detach().reshape(size, -1)
    units = torch.eye(rows.shape[1], dtype=at.dtype, device=at.device)
    blocks = torch.stack([product(unit.expand_as(rows)).reshape(size, -1) for unit in units], dim=2)
    test = _signs(torch.arange(size), 0, at.numel(), at).view(size, -1)
    expected = product(test).reshape(size, -1)
    found = (blocks @ test[..., None]).squeeze(2)
    if float((found - expected).norm()) > _ROUNDING * float(expected.norm()):
        return None  # the predictions of an example are not side by side
    blocks = ((blocks + blocks.mT) / 2).double()
    # A triangular root costs far less than a symmetric one. It needs a positive definite matrix.
    means = blocks.diagonal(dim1=1, dim2=2).mean(1)
    shift = _SHIFT * (means + _SHIFT * means.max()) + torch.finfo(blocks.dtype).tiny
    roots, failed = torch.linalg.cholesky_ex(blocks + torch.diag_embed(shift[:, None].expand(rows.shape)))
    failing = failed.nonzero().squeeze(1)
    if len(failing):  # rounding made an eigenvalue negative
        values, vectors = torch.linalg.eigh(blocks[failing])
        roots[failing] = vectors * values.clamp_min(0).sqrt()[:, None, :]
    return roots.to(at)


def _root_product(product: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """``H^(1/2) v`` by the Lanczos method (Higham, *Functions of Matrices*, 2008, section 13.2)."""
    length = norms(vector)
    basis, diagonal, beside = [vector / length], [], []
    for step in range(min(_STEPS, vector.numel())):
        image = product(basis[-1]).reshape(-1)
        diagonal.append(float(basis[-1] @ image))
        span = torch.stack(basis)
        for _ in range(2):  # twice, so that the basis stays orthogonal
            image = image - span.T @ (span @ image)
        size = float(norms(image))
        if step + 1 == min(_STEPS, vector.numel()) or size <= _ROUNDING * max(map(abs, diagonal)):
            break
        beside.append(size)
        basis.append(image / size)
    off = torch.tensor(beside, dtype=torch.float64)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    weights = vectors @ (values.clamp_min(0).sqrt() * vectors[0])
    return length * (torch.stack(basis).T @ weights.to(vector))


def _signs(ids: Tensor, seed: int, total: int, like: Tensor) -> Tensor:
    """Random signs, ``(total,)``: an equal number for each example, drawn from its id."""
    ids = ids.to(like.device)
    each = torch.arange(-(-total // len(ids)), device=like.device)
    first = _mixed(_mixed(torch.full_like(ids, seed)) + ids)
    return 1 - 2 * (_mixed(first[:, None] + each).flatten()[:total] < 0).to(like.dtype)


def _mixed(numbers: Tensor) -> Tensor:
    """Numbers of 64 bits that look random, one for each given one: a step of SplitMix64 (Steele, Lea, Flood 2014).

    Each is a one-to-one function of the given one, with the same bits on every device.
    """
    numbers = numbers * _STEP_OF_64_BITS
    for shift, factor in _MIXING:
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)
