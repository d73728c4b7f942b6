"""The curvature of the training loss as an operator on vectors, streamed over data, and its rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ._compat import rank_zero_warn
from .data import Examples, map_tensors, same_structure
from .errors import ConfigurationError, GIFWarning, ObjectiveError
from .parameters import ParameterSpace, Targets
from .registry import Registry
from .solvers import LinearOperator, Solution

__all__ = [
    "CURVATURES",
    "METHODS",
    "Combination",
    "Curvature",
    "Group",
    "Linearise",
    "Losses",
    "Method",
    "Scaled",
    "Submatrix",
    "gauss_newton",
    "graph_bytes",
    "has_gauss_newton",
    "hessian",
]

Product = Callable[[Tensor], Tensor]
"""``v ↦ C v``, ``(p,) → (p,)``, where ``C`` is the *sum* of the curvatures of a micro-batch's examples."""

Linearise = Callable[[Tensor, Any], tuple[Product, tuple[Tensor, ...]]]
"""``(θ, batch) ↦`` the product at ``θ``, and tensors whose autograd graphs are all that the product keeps."""


def hessian(loss_sum: Callable[[Tensor, Any], Tensor]) -> Linearise:
    """The second derivative: the product is the reverse-mode derivative of ``∇L(θ)·v`` (Pearlmutter 1994).

    Args:
        loss_sum: ``(θ, batch) → ()``, the sum of the losses of a batch's examples; twice differentiable in ``θ``.
    """

    def linearise(theta: Tensor, data: Any) -> tuple[Product, tuple[Tensor, ...]]:
        theta = theta.detach().requires_grad_()
        loss = loss_sum(theta, data)
        if not loss.requires_grad:
            return torch.zeros_like, ()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
        if not gradient.requires_grad:  # the loss is linear in θ here and the second derivative is zero
            return torch.zeros_like, ()

        def product(vector: Tensor) -> Tensor:
            return torch.autograd.grad(gradient, theta, vector, retain_graph=True, materialize_grads=True)[0]

        return product, (gradient,)

    return linearise


def gauss_newton(
    outputs: Callable[[Tensor, Any], Tensor],
    loss_sum_at: Callable[[Tensor, Any], Callable[[Tensor], Tensor]],
    loss_sum: Callable[[Tensor, Any], Tensor],
) -> Linearise:
    """The generalised Gauss–Newton matrix ``Σ JᵢᵀHᵢJᵢ`` (Schraudolph 2002; Martens, JMLR 21, 2020, section 8).

    ``J`` is the Jacobian of the model's outputs, ``Hᵢ`` the second derivative of the loss in these outputs: the Hessian
    without the curvature of the model itself. Where the loss is convex in the outputs it is positive semi-definite.

    Args:
        outputs: ``(θ, batch) → (…)``, what the loss is a function of.
        loss_sum_at: ``(θ, batch) →`` the sum of the batch's losses as a function of the outputs alone.
        loss_sum: ``(θ, batch) → ()``, the same as a function of ``θ``; to check, at the first batch of each structure,
            that the whole loss goes through the outputs.

    Raises:
        ObjectiveError: From the product, if it does not.
    """
    checked: list[Any] = []  # structures

    def check(theta: Tensor, data: Any, out: Tensor, slope: Tensor) -> None:
        if any(same_structure(data, one) for one in checked):
            return
        whole = loss_sum(theta, data)
        expected = through = torch.zeros_like(theta)
        if whole.requires_grad:
            (expected,) = torch.autograd.grad(whole, theta, materialize_grads=True)
        if out.requires_grad:
            (through,) = torch.autograd.grad(out, theta, slope.detach(), retain_graph=True, materialize_grads=True)
        if float((through - expected).norm()) > 1e-3 * float(expected.norm()):
            raise ObjectiveError(
                "curvature='ggn' needs a loss that is a function of the model's predictions alone, given to a loss"
                " function of PyTorch as its first argument, but the gradient through them is not the loss's."
                " Most often a penalty is added to the loss (give it as `weight_decay`), or arguments are swapped. Or"
                " use curvature='hessian'."
            )
        checked.append(map_tensors(data, lambda tensor: tensor.new_empty([0] * tensor.ndim)))  # without its memory

    def linearise(theta: Tensor, data: Any) -> tuple[Product, tuple[Tensor, ...]]:
        theta = theta.detach().requires_grad_()
        out = outputs(theta, data)
        at = out.detach().requires_grad_()
        loss = loss_sum_at(theta.detach(), data)(at)
        slope = torch.zeros_like(at)
        if loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, at, create_graph=True, materialize_grads=True)
        check(theta, data, out, slope)
        if not slope.requires_grad:  # the loss is linear in its predictions here
            return torch.zeros_like, ()
        # Jᵀu is linear in u, so that its derivative by u in the direction v is J v: forward mode from two reverse ones.
        dummy = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, theta, dummy, create_graph=True, materialize_grads=True)

        def product(vector: Tensor) -> Tensor:
            (pushed,) = torch.autograd.grad(pulled, dummy, vector, retain_graph=True, materialize_grads=True)
            (curved,) = torch.autograd.grad(slope, at, pushed, retain_graph=True, materialize_grads=True)
            return torch.autograd.grad(out, theta, curved, retain_graph=True, materialize_grads=True)[0]

        return product, (pulled, slope)

    return linearise


class Losses(Protocol):
    """What a curvature needs of an objective, see :class:`~lightning_gif.objective.Objective`."""

    def loss_sum(self, theta: Tensor, data: Any) -> Tensor: ...
    def outputs(self, theta: Tensor, data: Any) -> Tensor: ...
    def loss_sum_at(self, theta: Tensor, data: Any) -> Callable[[Tensor], Tensor]: ...


CURVATURES: Registry[Callable[[Losses], Linearise]] = Registry("curvature")
"""The curvatures of an objective by name."""

CURVATURES.register("hessian")(lambda objective: hessian(objective.loss_sum))
CURVATURES.register("ggn")(lambda objective: gauss_newton(objective.outputs, objective.loss_sum_at, objective.loss_sum))


def has_gauss_newton(losses: Losses, theta: Tensor, data: Any) -> bool:
    """Whether the losses of a batch are a function of predictions alone, so that they have a Gauss–Newton matrix."""
    try:
        CURVATURES["ggn"](losses)(theta, data)
    except ObjectiveError:
        return False
    return True


class Curvature:
    """``C = (1/n) Σᵢ Cᵢ + w·I`` over examples, acting on flat vectors ``(p,)``, or several as columns ``(p, q)``.

    Micro-batches count with their true sizes, so a ragged last batch counts as what it is. At a fixed ``θ`` the first
    pass of a product, which does not depend on the vector, is kept for as many micro-batches as ``memory`` allows, and
    done anew for the others: memory does not grow with the number of examples. Several vectors share it. Where several
    processes share out the examples, each keeps passes of its own part, and products are those of all.

    Args:
        linearise: The curvature of a micro-batch: :func:`hessian` or :func:`gauss_newton`.
        theta: Where it is taken, ``(p,)``.
        examples: Over which data, iterated once for each product.
        weight_decay: ``w``: the training objective's ``(w/2)‖θ‖²``.
        memory: Bytes that kept passes may take.
        on_product: Called at each product, to show progress.
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

    @property
    def _batches(self) -> int:
        """How many this process goes through."""
        return self._examples.n_mine

    def summary(self) -> dict[str, int]:
        """How the products were made: micro-batches, of how many the first pass was kept, products and examples."""
        batches, kept = self._examples.ranks.sum(torch.tensor([self._batches, len(self._kept)])).tolist()
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
            total += torch.stack([product(column) for column in columns.T], dim=1)
            del product  # before the next is made, so that there is one at a time
        total = self._examples.ranks.sum(total)
        self._is_zero = self._is_zero and not bool(total.any())
        total = total / len(self._examples) + self._weight_decay * columns
        return total[:, 0] if vectors.ndim == 1 else total

    rmatvec = matvec
    """``Cᵀ V = C V``."""

    def warn_if_zero(self) -> None:
        """Warns if all products that were asked for are exactly zero, but for the weight decay."""
        if self.products and self._is_zero:
            rank_zero_warn(
                "The curvature of the training loss is exactly zero in all directions that were looked at: only damping"
                " and weight decay were inverted, so that results have the gradients' directions but no meaningful"
                " size. Either the loss is linear in the model's predictions (F.nll_loss of scores that are not"
                " log-probabilities: use F.cross_entropy), or the predictions do not depend on the parameters"
                " (saturated or dead units). If the model itself is curved, curvature='hessian' sees it.",
                category=GIFWarning,
            )

    def _passes(self) -> Iterator[Product]:
        """The products of the micro-batches: those that are kept, then the others, one at a time."""
        if len(self._kept) == self._batches:
            yield from self._kept
            return
        # All batches are read, also those whose passes are kept: random augmentation repeats itself only as a whole.
        for position, batch in enumerate(self._examples.mine()):
            if position < len(self._kept):
                yield self._kept[position]
                continue
            product, graphs = self._linearise(self._theta, batch.data)
            if not self._full:
                self._memory -= graph_bytes(*graphs)
                self._full = self._memory < 0
            if not self._full:
                self._kept.append(product)
            yield product
            del product, graphs

    def draw(self, seed: int) -> Curvature:
        """The same curvature over one micro-batch of examples drawn at random: an unbiased estimate of it.

        Its products count as its own and, by the share of the examples, as this operator's.
        """
        count = min(self._examples.batch_size, len(self._examples))
        return _Draw(self, self._examples.sample(count, seed))


class _Draw(Curvature):
    """The curvature over a few of another's examples, whose counts it adds to."""

    def __init__(self, whole: Curvature, examples: Examples) -> None:
        super().__init__(whole._linearise, whole._theta, examples, weight_decay=whole._weight_decay)
        self._whole = whole

    def matvec(self, vectors: Tensor) -> Tensor:
        before = self.products, self.examples
        found = super().matvec(vectors)
        self._whole.products += self.products - before[0]
        self._whole.examples += self.examples - before[1]
        self._whole._is_zero = self._whole._is_zero and self._is_zero
        return found

    rmatvec = matvec


def graph_bytes(*results: Tensor) -> int:
    """How many bytes the autograd graphs of tensors keep alive: each storage once, and no more of it than is used.

    Found by walking the graph and asking each node for what it saved, which works under ``torch.func.vmap`` as well,
    where hooks on saved tensors do not.
    """
    found: dict[int, int] = {}
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
                    used = min(storage.nbytes(), tensor.numel() * tensor.element_size())  # not a whole data set's
                    found[storage.data_ptr()] = max(used, found.get(storage.data_ptr(), 0))
        queue += [following for following, _ in node.next_functions]
    return sum(found.values())


class _View:
    """A way to look at an operator, whose products it spends."""

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator
        self.dtype, self.device = operator.dtype, operator.device

    @property
    def products(self) -> int:
        """Products of the underlying operator spent so far."""
        return self._operator.products

    @property
    def examples(self) -> int:
        """Examples that these went through."""
        return self._operator.examples


class Submatrix(_View):
    """``C[rows, cols]`` of a symmetric operator ``C``, without forming it.

    Args:
        curvature: ``C``, ``(p, p)``, symmetric.
        rows: Sorted positions ``(r,)`` of the kept rows, or ``None`` for all.
        cols: Sorted positions ``(c,)`` of the kept columns, or ``None`` for all.
    """

    def __init__(self, curvature: LinearOperator, rows: Tensor | None, cols: Tensor | None) -> None:
        super().__init__(curvature)
        self._rows, self._cols = rows, cols
        size = curvature.shape[0]
        self.shape = (size if rows is None else rows.numel(), size if cols is None else cols.numel())

    @property
    def T(self) -> Submatrix:
        """The transpose ``C[cols, rows]``."""
        return Submatrix(self._operator, self._cols, self._rows)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(c,) → (r,)``, or ``(c, q) → (r, q)``."""
        image = self._operator.matvec(_scatter(vectors, self._cols, self._operator.shape[0]))
        return image if self._rows is None else image[self._rows]

    def rmatvec(self, vectors: Tensor) -> Tensor:
        """``(r,) → (c,)``, or ``(r, q) → (c, q)``."""
        return self.T.matvec(vectors)

    def draw(self, seed: int) -> Submatrix:
        """The same rows and columns of the curvature over a few random examples, see :meth:`Curvature.draw`."""
        return Submatrix(self._operator.draw(seed), self._rows, self._cols)  # type: ignore[attr-defined]


class Scaled(_View):
    """``B diag(d)``, or ``diag(d) B diag(d)``: an operator with its columns, and perhaps its rows, in other units.

    Args:
        operator: ``B``, ``(rows, cols)``.
        units: ``d``, ``(cols,)``.
        rows: Scale the rows as well, those of a square ``B``.
    """

    def __init__(self, operator: LinearOperator, units: Tensor, *, rows: bool = False) -> None:
        super().__init__(operator)
        self._units, self._rows, self.shape = units, rows, operator.shape

    def matvec(self, vectors: Tensor) -> Tensor:
        image = self._operator.matvec(self._times_units(vectors))
        return self._times_units(image) if self._rows else image

    def rmatvec(self, vectors: Tensor) -> Tensor:
        return self._times_units(self._operator.rmatvec(self._times_units(vectors) if self._rows else vectors))

    def _times_units(self, vectors: Tensor) -> Tensor:
        return self._units * vectors if vectors.ndim == 1 else self._units[:, None] * vectors

    def draw(self, seed: int) -> Scaled:
        return Scaled(self._operator.draw(seed), self._units, rows=self._rows)  # type: ignore[attr-defined]


class Combination:
    """``Σ wᵢ Cᵢ`` of symmetric operators ``(p, p)``.

    Args:
        terms: Pairs of a weight and an operator.
    """

    def __init__(self, *terms: tuple[float, LinearOperator]) -> None:
        self._terms = terms
        (_, first), *_ = terms
        self.shape, self.dtype, self.device = first.shape, first.dtype, first.device

    @property
    def products(self) -> int:
        """Products of all terms."""
        return sum(operator.products for _, operator in self._terms)

    @property
    def examples(self) -> int:
        """Examples that these went through."""
        return sum(operator.examples for _, operator in self._terms)

    def matvec(self, vectors: Tensor) -> Tensor:
        """``(p,) → (p,)``, or ``(p, q) → (p, q)``."""
        images = [weight * operator.matvec(vectors) for weight, operator in self._terms]
        return torch.stack(images).sum(0)

    rmatvec = matvec

    def draw(self, seed: int) -> Combination:
        """The same of the curvatures over a few random examples each, see :meth:`Curvature.draw`."""
        return Combination(*((weight, operator.draw(seed)) for weight, operator in self._terms))  # type: ignore[attr-defined]


def _scatter(vectors: Tensor, positions: Tensor | None, size: int) -> Tensor:
    """The vectors ``(size, …)`` that have ``vectors`` at ``positions`` and zeros elsewhere."""
    if positions is None:
        return vectors
    return vectors.new_zeros(size, *vectors.shape[1:]).index_copy(0, positions, vectors)


Solve = Callable[[LinearOperator, Tensor], "Solution | list[Solution]"]


@dataclass(frozen=True)
class Group:
    """The examples in question, for methods that look at their curvature as well.

    Attributes:
        share: ``p = m/n``, of all training examples.
        old: Their curvature with the labels that they were trained with.
        new: The same with corrected labels; ``None`` if they are removed.
    """

    share: float
    old: LinearOperator
    new: LinearOperator | None


@dataclass(frozen=True)
class Method:
    """Which rows and columns of the curvature an influence method inverts, in the least-squares sense.

    With ``M = C[rows, cols]``, the change of the targets for a weighted gradient ``g`` is ``x = (M⁺ g[rows])[S]``. The
    first-order methods of the GIF paper (arXiv 2312.05586, section 4) are all of this form.

    Attributes:
        rows: ``"all"`` or ``"targets"``.
        cols: ``"all"`` or ``"targets"``.
        selects: ``False`` if the method changes every parameter, whatever was selected.
    """

    rows: str = "all"
    cols: str = "all"
    selects: bool = True

    def edit(
        self,
        curvature: LinearOperator,
        targets: Tensor,
        gradient: Tensor,
        solve: Solve,
        group: Group | None = None,
        units: Tensor | None = None,
    ) -> tuple[Tensor, list[Solution]]:
        """The change of the targets that answers a weighted gradient, and the solves.

        Args:
            curvature: ``C``, ``(p, p)``.
            targets: ``S``, ``(k,)``.
            gradient: ``g``, ``(p,)``.
            solve: See :meth:`~lightning_gif.settings.Settings.solve`.
            group: The examples in question, for methods that ask for them.
            units: ``d > 0`` ``(p,)``: the solve is for ``y`` in ``x = d y``. An unregularised minimiser that is unique
                stays the same; a solve that stops early moves more what has larger units, and damping is on ``y``.

        Returns:
            ``x`` ``(k,)``, and a solution for each solve.
        """
        matrix: LinearOperator = self._matrix(curvature, targets)
        if units is not None:
            units = units if self.cols == "all" else units[targets]
            matrix = Scaled(matrix, units)
        (solution,) = _as_list(solve(matrix, gradient if self.rows == "all" else gradient[targets]))
        change = solution.x if units is None else units * solution.x
        return (change if self.cols == "targets" else change[targets]), [solution]

    def query(
        self, curvature: LinearOperator, targets: Tensor, gradients: Tensor, solve: Solve
    ) -> tuple[Tensor, list[Solution]]:
        """The vectors ``w`` for which ``wᵀg = q[S]ᵀx(g)`` for every ``g``, and the solves.

        The map ``g → x`` is linear, so its adjoint takes a query's gradient ``q`` to ``w`` once, and then each
        training example costs one inner product with its gradient. The adjoint of a pseudo-inverse is the
        pseudo-inverse of the transpose: the same solver on ``Mᵀ``, right-hand side ``q[S]``. All queries are solved
        together.

        Args:
            curvature: ``C``, ``(p, p)``.
            targets: ``S``, ``(k,)``.
            gradients: Of the queries, ``(n_queries, p)``.
            solve: See :meth:`~lightning_gif.settings.Settings.solve`.

        Returns:
            ``(n_queries, p)``, and a solution for each.

        Raises:
            ObjectiveError: If the gradient of a query vanishes on all targets.
        """
        size = curvature.shape[0]
        on_targets = gradients[:, targets].T
        blind = (~on_targets.any(dim=0)).nonzero().flatten().tolist()
        if blind:
            which = f"The query {blind[0]}" if len(gradients) > 1 else "The query"
            raise ObjectiveError(
                f"{which} does not depend on the target parameters: its gradient on all of them is exactly zero, so"
                " no training example could have moved it through them. Use targets='batch', a larger ratio, or"
                " method='if'."
            )
        rhs = on_targets if self.cols == "targets" else _scatter(on_targets, targets, size)
        solutions = _as_list(solve(self._matrix(curvature, targets).T, rhs))
        found = torch.stack([solution.x for solution in solutions], dim=1)
        return (found if self.rows == "all" else _scatter(found, targets, size)).T, solutions

    def _matrix(self, curvature: LinearOperator, targets: Tensor) -> Submatrix:
        return Submatrix(
            curvature,
            targets if self.rows == "targets" else None,
            targets if self.cols == "targets" else None,
        )

    def targets(self, space: ParameterSpace, selected: Callable[[], Targets]) -> Targets:
        """What the method changes: the selection, or everything."""
        return selected() if self.selects else Targets.whole(space)


@dataclass(frozen=True)
class SecondOrder(Method):
    """The second-order influence of a group on all parameters (Basu, You and Feizi, ICML 2020).

    The risk is led from that on all data, ``L``, to the one that should hold, ``L'``, along the straight line
    ``L + t(L' − L)``; its minimiser is expanded in ``t`` up to ``t²``, without third derivatives of the losses. With
    ``C`` the curvature of ``L`` and ``C'`` that of ``L'``, ``θ₁ = C⁻¹∇(L − L')`` is the first order, and
    ``C⁻¹(C − C')θ₁`` the second.
    """

    def edit(
        self,
        curvature: LinearOperator,
        targets: Tensor,
        gradient: Tensor,
        solve: Solve,
        group: Group | None = None,
        units: Tensor | None = None,
    ) -> tuple[Tensor, list[Solution]]:
        """The change of all parameters, and the two solves; without a group there is no second order.

        With one there are no other units.
        """
        if group is None:
            return super().edit(curvature, targets, gradient, solve, units=units)
        whole = Combination((1 - group.share, curvature), (group.share, group.old))
        # Removal: L' is the risk on the retained data, and C − C' = p (C_U − C_R). Relabelling: L' is that on all
        # data with the new labels, and C − C' = p (C_old − C_new).
        removal = group.new is None
        difference = Combination(
            (group.share, group.old), (-group.share, curvature if group.new is None else group.new)
        )
        (first,) = _as_list(solve(whole, gradient if removal else (1 - group.share) * gradient))
        (second,) = _as_list(solve(whole, difference.matvec(first.x)))
        return first.x + second.x, [first, second]

    def query(
        self, curvature: LinearOperator, targets: Tensor, gradients: Tensor, solve: Solve
    ) -> tuple[Tensor, list[Solution]]:
        """Raises: the second order is that of one given group, not of each training example."""
        raise ConfigurationError(
            "method='sif' is the second-order influence of a group that is removed or relabelled; it has no score for"
            " single training examples other than that of method='if'. Use 'if', or 'gif'."
        )


def _as_list(found: Solution | list[Solution]) -> list[Solution]:
    return found if isinstance(found, list) else [found]


METHODS: Registry[Method] = Registry("method")
"""The influence methods by the paper's names."""

METHODS.register("gif")(Method(rows="all", cols="targets"))
METHODS.register("fif")(Method(rows="targets", cols="targets"))
METHODS.register("pif")(Method(rows="all", cols="all"))
METHODS.register("if")(Method(rows="all", cols="all", selects=False))
METHODS.register("sif")(SecondOrder(selects=False))
