"""The curvature of the training loss as a linear operator, whose products are streamed over data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._compat import rank_zero_warn
from ..data.examples import Examples
from ..errors import GIFWarning
from .products import Linearise, Product

__all__ = ["Curvature", "graph_bytes", "warn_of_zero_curvature"]


class Curvature:
    """The curvature ``C = (1/n) Σᵢ Cᵢ + w·I`` over examples, as an operator on vectors ``(p,)`` or columns ``(p, q)``.

    Examples have equal weights, even if micro-batches differ in size. At a fixed ``θ`` the first pass of a product does
    not depend on the vector, so several vectors share it. It is kept for as many micro-batches as ``memory`` allows,
    and repeated for the others. So memory does not grow with the number of examples. In a distributed run each process
    keeps the passes of its own shard, and products are over all shards.

    Args:
        linearise: The curvature of a micro-batch: :func:`~lightning_gif.curvature.products.hessian` or
            :func:`~lightning_gif.curvature.products.gauss_newton`.
        theta: The parameters ``(p,)`` at which it is taken.
        examples: The examples, read once for each product.
        weight_decay: The factor ``w`` of the term ``(w/2)‖θ‖²`` of the training objective.
        memory: The largest number of bytes that kept passes may take.
        on_product: Called for each product, to show progress.

    Attributes:
        positive_semidefinite: Whether ``C`` has no negative eigenvalues, as ``linearise`` declares.
        products: The number of products with a vector so far.
        examples: The number of examples in all these products together.
        shape, dtype, device: See :class:`~lightning_gif.solvers.LinearOperator`.
    """

    def __init__(
        self,
        linearise: Linearise,
        theta: Tensor,
        examples: Examples,
        *,
        weight_decay: float = 0.0,
        memory: float = 0.0,
        on_product: Callable[[], Any] = lambda: None,
    ) -> None:
        self._linearise = linearise
        self._theta = theta
        self._examples = examples
        self._weight_decay = weight_decay
        self._memory = memory
        self._on_product = on_product
        self._kept: list[Product] = []
        self._full = memory <= 0  # no room for a further pass
        self.products = 0
        self.examples = 0
        self._is_zero = True  # of all products so far
        self.shape = (theta.numel(), theta.numel())
        self.dtype, self.device = theta.dtype, theta.device
        self.positive_semidefinite = bool(getattr(linearise, "positive_semidefinite", False)) and weight_decay >= 0

    @property
    def _batches(self) -> int:
        """The number of micro-batches of this process."""
        return self._examples.n_local_batches

    def summary(self) -> dict[str, int]:
        """The numbers of micro-batches, of kept first passes, of products, and of examples in all products."""
        batches, kept = self._examples.processes.sum(torch.tensor([self._batches, len(self._kept)])).tolist()
        return {
            "batches": batches,
            "batches_kept": kept,
            "products": self.products,
            "examples": self.examples,
        }

    def matvec(self, vectors: Tensor) -> Tensor:
        """``C V``: ``(p,) → (p,)`` or ``(p, q) → (p, q)``."""
        columns = vectors[:, None] if vectors.ndim == 1 else vectors
        for _ in range(columns.shape[1]):
            self.products += 1
            self.examples += len(self._examples)
            self._on_product()
        total = torch.zeros_like(columns)
        for product in self._passes():
            # Contiguous, because other kernels round differently. The number of columns may depend on the free memory,
            # and the result for a column must not.
            if getattr(product, "takes_columns", False):
                total += product(columns)
            else:
                total += torch.stack([product(column.contiguous()) for column in columns.T], dim=1)
            del product  # so that the next product is not in memory at the same time
        total = self._examples.processes.sum(total)
        self._is_zero = self._is_zero and not bool(total.any())
        total = total / len(self._examples) + self._weight_decay * columns
        return total[:, 0] if vectors.ndim == 1 else total

    rmatvec = matvec
    """``Cᵀ V = C V``."""

    def warn_if_zero(self) -> None:
        """Warns if all products so far were exactly zero, apart from weight decay."""
        if self.products and self._is_zero:
            warn_of_zero_curvature()

    def _passes(self) -> Iterator[Product]:
        """Yields the product of each micro-batch: first the kept ones, then the others, computed one at a time."""
        if len(self._kept) == self._batches:
            yield from self._kept
            return
        # Batches with a kept pass are read, too: random augmentation is repeated exactly only over a whole pass.
        for position, batch in enumerate(self._examples.local_batches()):
            if position < len(self._kept):
                yield self._kept[position]
                continue
            product, graphs = self._linearise(self._theta, batch)
            if not self._full:
                self._memory -= graph_bytes(*graphs)
                self._full = self._memory < 0
            if not self._full:
                self._kept.append(product)
            yield product
            del product, graphs

    def draw(self, seed: int) -> Curvature:
        """The curvature over one micro-batch of randomly drawn examples: an unbiased estimate of this curvature.

        Its products and their examples are added to the counts of this operator.

        Args:
            seed: The seed of the draw.
        """
        count = min(self._examples.batch_size, len(self._examples))
        return _Draw(self, self._examples.sample(count, seed))


class _Draw(Curvature):
    """The curvature over a few examples of another curvature, to which it adds its counts."""

    def __init__(self, whole: Curvature, examples: Examples) -> None:
        super().__init__(whole._linearise, whole._theta, examples, weight_decay=whole._weight_decay)
        self._whole = whole

    def matvec(self, vectors: Tensor) -> Tensor:
        before = self.products, self.examples
        image = super().matvec(vectors)
        self._whole.products += self.products - before[0]
        self._whole.examples += self.examples - before[1]
        self._whole._is_zero = self._whole._is_zero and self._is_zero
        return image

    rmatvec = matvec


def graph_bytes(*results: Tensor) -> int:
    """The number of bytes that tensors and their autograd graphs keep alive.

    A tensor with a graph is not counted itself. Each storage counts once, with the bytes that the saved tensor uses of
    it. The saved tensors are read from the nodes of the graph, because hooks on saved tensors do not work under
    ``torch.func.vmap``.
    """
    sizes = {result.data_ptr(): result.nbytes for result in results if result.grad_fn is None}
    seen: set[Any] = set()
    queue = [result.grad_fn for result in results]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = list(getattr(node, "saved_tensors", ()))
        saved += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in saved:
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    used = min(storage.nbytes(), tensor.numel() * tensor.element_size())  # not the whole storage
                    sizes[storage.data_ptr()] = max(used, sizes.get(storage.data_ptr(), 0))
        queue += [following for following, _ in node.next_functions]
    return sum(sizes.values())


def warn_of_zero_curvature() -> None:
    """Warns that the curvature was zero in all directions that were evaluated."""
    rank_zero_warn(
        "The curvature of the training loss is exactly zero in all directions that were evaluated. Only damping and"
        " weight decay were inverted, so the results have the directions of gradients but no meaningful size. Either"
        " the loss is linear in the model's predictions (F.nll_loss of scores that are not log-probabilities: use"
        " F.cross_entropy), or the predictions do not depend on the parameters (saturated or dead units)."
        " curvature='hessian' includes the curvature of the model itself.",
        category=GIFWarning,
    )
