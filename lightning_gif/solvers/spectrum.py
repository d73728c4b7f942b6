"""The extreme eigenvalues of a symmetric operator, and the share of negative ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import LinearOperator
from .lanczos import quadrature

__all__ = ["Spectrum", "spectrum"]


@dataclass(frozen=True)
class Spectrum:
    """Estimates of the eigenvalues of a symmetric operator by the Lanczos process.

    Attributes:
        largest: Lower estimates of the largest distinct eigenvalues, descending.
        smallest: Upper estimates of the smallest distinct eigenvalues, ascending.
        negative_share: The estimated share of negative eigenvalues, not counting those that are zero up to rounding.
        zero_share: The estimated share of eigenvalues that are zero up to rounding.
    """

    largest: list[float]
    smallest: list[float]
    negative_share: float
    zero_share: float


def spectrum(operator: LinearOperator, count: int, *, steps: int = 0, probes: int = 2, seed: int = 0) -> Spectrum:
    """The extreme eigenvalues by stochastic Lanczos quadrature.

    The Lanczos process starts at a random sign vector and is fully reorthogonalised. It gives a quadrature rule for the
    density of the eigenvalues (Ubaru, Chen and Saad, *SIAM Journal on Matrix Analysis and Applications* 38, 2017). Its
    nodes are the Ritz values, of which the extreme ones converge first. The weights of the nodes in an interval,
    averaged over start vectors, add up to the share of the eigenvalues in this interval. ``steps`` vectors are kept in
    memory.

    Args:
        operator: A symmetric matrix, ``(p, p)``.
        count: The number of eigenvalues at each end; fewer are returned if fewer are resolved.
        steps: The number of products for each start vector; by default ``4·count``, at least 30.
        probes: The number of start vectors.
        seed: Seed of the start vectors.

    Raises:
        NonFiniteError: If a product is not finite.
    """
    size = operator.shape[0]
    steps = min(steps or max(4 * count, 30), size)
    generator = torch.Generator().manual_seed(seed)
    values, weights = [], []
    for _ in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        nodes, shares = quadrature(operator.matvec, signs.to(operator.device, operator.dtype) / size**0.5, steps)
        values.append(nodes)
        weights.append(shares / probes)
    nodes, shares = torch.cat(values), torch.cat(weights)
    # The nodes of one start vector are distinct, but several start vectors repeat converged eigenvalues. So each end is
    # taken from one start vector, the one with the most extreme node.
    top = max(values, key=lambda ritz: float(ritz[-1]))
    bottom = min(values, key=lambda ritz: float(ritz[0]))
    count = min(count, (len(top) + 1) // 2, (len(bottom) + 1) // 2)
    rounding = torch.finfo(operator.dtype).eps * float(nodes.abs().max()) * size**0.5
    return Spectrum(
        largest=top.flip(0)[:count].tolist(),
        smallest=bottom[:count].tolist(),
        negative_share=float(shares[nodes < -rounding].sum()),
        zero_share=float(shares[nodes.abs() <= rounding].sum()),
    )
