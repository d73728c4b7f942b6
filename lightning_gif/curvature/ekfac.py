"""EK-FAC: the Gauss–Newton matrix in a basis of Kronecker products, with corrected eigenvalues.

George, Laurent, Bouthillier, Ballas and Vincent, NeurIPS 2018; for influence functions Grosse et al., arXiv 2308.03296.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..config import Settings
from ..data.batch import Batch
from ..data.examples import Examples
from ..distributed import ProcessGroup
from ..errors import ConfigurationError
from ..objective import outputs
from ..objective.layer_gradients import LayerGradients, RecordedPass
from ..objective.layers import Convolution, Embedding, Linear, Part, Use
from ..objective.objective import Objective
from ..parameters import ParameterSpace
from ..solvers import Solution, require_finite
from .inverse import INVERSES, InverseCurvature
from .methods import Method
from .output_curvature import output_vectors
from .products import require_gauss_newton
from .sampling import kept_sample
from .streaming import warn_of_zero_curvature

__all__ = [
    "LEAST_DAMPING",
    "EKFACInverse",
    "KroneckerBlock",
    "eigenvectors",
    "inverse_root",
    "kronecker_blocks",
    "require_layers",
    "rotated_gradients",
    "sum_of_squares",
]

# The smallest damping of a layer, as a share of that of all parameters: a layer of dead units has eigenvalues of 0.
LEAST_DAMPING = 1e-6

# A matrix with more rows or columns than these keeps its own basis on that side: eigenvectors would take too long.
_LARGEST_SIDE = 8192

_MATRICES = (Linear.kind, Convolution.kind)

# The number of gradients whose iHVPs are computed at a time, which limits the memory for copies.
_TOGETHER = 32

# Gradients of examples are rotated into the Kronecker basis in parts of about this size, which stay in the cache.
_PART_BYTES = 2**22

# With up to so many positions, sums of squares come from pairs of positions, without the gradients: with 4 positions of
# a layer of 256 x 1152 this takes a third of the time, with 16 positions many times as long.
_PAIRED = 4

# With fewer examples, several random vectors are drawn for each, up to so many for all of them.
_DRAWS = 256


Values = Callable[[str], Tensor]
"""From the name of a parameter to the values ``(m, size)`` of its entries."""


@dataclass
class KroneckerBlock:
    """The matrix ``W`` ``(o, i)`` of a layer, with its bias as one more column, and its curvature in a Kronecker basis.

    Attributes:
        weight: Where the matrix is.
        bias: Where the bias is, if there is one.
        is_table: Whether the matrix is the transpose of the table of an embedding, whose inputs are unit vectors.
        outer: The eigenvectors ``U`` of the second moment of output gradients, ``(o, o)``; ``None`` for the unit
            vectors, if there are too many outputs.
        inner: The eigenvectors ``V`` of the second moment of inputs, ``(i, i)``, or ``(i + 1, i + 1)`` with a bias;
            ``None`` for the unit vectors, which are the inputs of a table, or if there are too many inputs.
        values: The corrected eigenvalues, ``(o, i)`` or ``(o, i + 1)``.
    """

    weight: Part
    bias: Part | None
    is_table: bool
    outer: Tensor | None = None
    inner: Tensor | None = None
    values: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def parts(self) -> list[Part]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrix(self, values: Values) -> Tensor:
        """The entries of the block as matrices ``(m, o, i)``."""
        weight = self.weight.of(values(self.weight.name))
        matrix = weight.mT if self.is_table else weight.flatten(2)
        return matrix if self.bias is None else torch.cat([matrix, self.bias.of(values(self.bias.name))[..., None]], 2)

    def write(self, matrix: Tensor, values: Values) -> None:
        """Adds matrices ``(m, o, i)`` to the entries of the block."""
        if self.bias is not None:
            matrix, bias = matrix[..., :-1], matrix[..., -1]
            self.bias.add_to(values(self.bias.name), bias)
        weight = matrix.mT if self.is_table else matrix
        self.weight.add_to(values(self.weight.name), weight.reshape(len(matrix), -1))

    def sides(self, recorded: RecordedPass, deltas: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs ``(B, T, i)`` and output gradients ``(B, T, o)`` of each use of the matrix."""
        for layer, delta, axis in zip(recorded.layers, deltas, recorded.axes, strict=True):
            kind = Embedding if self.is_table else Linear
            if isinstance(layer, kind) and layer.weight.signature == self.weight.signature:
                inputs, outer = layer.sides(delta, axis, recorded.size)
                if self.bias is not None:
                    inputs = torch.cat([inputs, inputs.new_ones(*inputs.shape[:2], 1)], 2)
                yield inputs, outer

    def rotate(self, matrix: Tensor) -> Tensor:
        """``UᵀMV`` for matrices ``M`` ``(m, o, i)``: their coordinates in the Kronecker basis."""
        rotated = matrix if self.outer is None else self.outer.T @ matrix
        return rotated if self.inner is None else rotated @ self.inner

    def rotate_back(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`rotate`."""
        rotated = matrix if self.outer is None else self.outer @ matrix
        return rotated if self.inner is None else rotated @ self.inner.T


def kronecker_blocks(uses: Iterable[Use], space: ParameterSpace) -> list[KroneckerBlock]:
    """The blocks of the parameters that are matrices of Linear or Conv layers, or tables of embeddings.

    A matrix that several layers use is one block if they use all of it in the same shape. Convolutions with groups have
    no block.
    """
    of_parameter: dict[str, list[Use]] = {}
    for use in uses:
        for part in use.parts:
            of_parameter.setdefault(part.name, []).append(use)
    blocks = []
    for name, users in of_parameter.items():
        matrices = [one for one in users if one.kind in _MATRICES and one.parts[0].name == name]
        of_block = matrices or [one for one in users if one.kind == Embedding.kind]
        if not of_block or any(one.groups > 1 for one in of_block):
            continue
        weight = of_block[0].parts[0]
        size = space.slots[name].size
        whole = weight.positions is None or (len(weight.positions) == size and len(weight.positions.unique()) == size)
        if not whole or any(one.parts[0].signature != weight.signature for one in of_block):
            continue
        biases = {one.parts[1].signature if len(one.parts) > 1 else None for one in of_block}
        bias = of_block[0].parts[1] if len(of_block[0].parts) > 1 and len(biases) == 1 else None
        if bias is not None and (bias.positions is not None or of_parameter[bias.name] != matrices):
            bias = None
        blocks.append(KroneckerBlock(weight, bias, is_table=not matrices))
    return blocks


@INVERSES.register("ekfac")
class EKFACInverse(InverseCurvature):
    """The inverse of the Gauss–Newton matrix in its EK-FAC approximation, plus a damping.

    Parameters that are not a matrix of a layer, such as the scales of a normalisation, get the diagonal of the matrix.

    Args:
        space: The parameters.
        blocks: The blocks of the matrices.
        diagonal: The diagonal of the Gauss–Newton matrix for each other parameter, ``(size,)``, by name.
        settings: The settings.
        rank: The largest possible rank of the Gauss–Newton matrix: the number of predictions for all examples.
        facts: How the curvature was computed, for :meth:`summary`.
        multiple: The default damping of a layer, in multiples of the mean of its eigenvalues that can be non-zero.
    """

    name = "ekfac"
    block_size = _TOGETHER

    def __init__(
        self,
        space: ParameterSpace,
        blocks: list[KroneckerBlock],
        diagonal: dict[str, Tensor],
        rank: int,
        settings: Settings,
        facts: dict[str, Any],
        multiple: float = 1.0,
    ) -> None:
        self._multiple = multiple
        self._space, self.blocks, self.diagonal, self._rank = space, blocks, diagonal, rank
        self._settings, self._facts = settings, facts
        self._own_damping = settings.damping is None
        values = [block.values for block in blocks] + list(diagonal.values())
        # For the report, the default is the mean over all parameters.
        mean = multiple * sum(self._mean(part) * part.numel() for part in values) / space.size
        self.damping = mean if settings.damping is None else float(settings.damping)

    def _mean(self, values: Tensor) -> float:
        """The mean of the eigenvalues of a layer that can differ from zero: no more than the rank."""
        return float(values.double().sum()) / min(values.numel(), self._rank)

    def damped(self, values: Tensor) -> Tensor:
        """The eigenvalues of a layer plus its damping and the weight decay; infinite if all of this is zero.

        The default damping of a layer is a multiple of the mean of its eigenvalues that can be non-zero. A mean over
        all would be smaller the wider the layer is, and scores larger. benchmarks/README.md, "Scores on several tasks".
        """
        damped = values + (self._damping(values) + self._settings.weight_decay)
        return torch.where(damped > 0, damped, torch.inf)

    def _damping(self, values: Tensor) -> float:
        """The damping of a layer with these eigenvalues."""
        own = max(self._multiple * self._mean(values), LEAST_DAMPING * self.damping)
        return own if self._own_damping else self.damping

    @classmethod
    def fit(
        cls,
        objective: Objective,
        train: Examples,
        settings: Settings,
        method: Method,
        positions: Tensor,
        *,
        on_product: Callable[[], Any] = lambda: None,
    ) -> Self:
        layers = require_layers(objective, settings, method)
        given = [f"`{name}`" for name in ("max_iter", "rtol", "discrepancy", "eigenvalues") if getattr(settings, name)]
        if given:
            raise ConfigurationError(
                f"solver='ekfac' takes no {', '.join(given)}, because it does not iterate and forms no products with"
                " the curvature. Omit them, or use solver='ekfac_cg'."
            )
        return cls.of(objective, layers, kept_sample(objective, train, settings), settings, on_product)

    @classmethod
    def n_updates(cls, settings: Settings, n_batches: int, n_queries: int) -> int | None:
        return 2 * n_batches

    @classmethod
    def corrections(cls, settings: Settings, n_queries: int) -> int | None:
        return 0

    @classmethod
    def of(
        cls,
        objective: Objective,
        layers: LayerGradients,
        examples: Examples,
        settings: Settings,
        on_product: Callable[[], Any],
        multiple: float = 1.0,
    ) -> Self:
        """The inverse for the mean over given examples."""
        passes = _Passes(objective, layers, examples, settings.seed, on_product)
        facts = {"kind": "ggn", "products": 0, "examples": len(examples)}
        return cls(objective.space, *_fit(passes), settings, facts, multiple)

    def ihvp(self, gradients: Tensor) -> tuple[Tensor, list[Solution]]:
        start = time.perf_counter()
        blocks = [(block, self.damped(block.values)) for block in self.blocks]
        diagonal = {name: self.damped(values) for name, values in self.diagonal.items()}
        result = gradients.clone()
        _change_in_basis(torch.div, result, self._space, blocks, diagonal)
        require_finite(result, "The iHVP")
        seconds = (time.perf_counter() - start) / len(gradients)
        return result, [Solution.direct(row, self.damping, seconds, solver=self.kind) for row in result]

    def quadratic(self) -> Callable[[Tensor], Tensor]:
        def values_of(gradients: Tensor) -> Tensor:
            total, space = gradients.new_zeros(len(gradients), dtype=torch.float64), self._space
            for block in self.blocks:
                rotated = block.rotate(block.matrix(lambda name: space.of(name, gradients)))
                total += (rotated.square() / self.damped(block.values)).sum((1, 2))
            for name, values in self.diagonal.items():
                total += (space.of(name, gradients).square() / self.damped(values)).sum(1)
            return total

        return values_of

    def of_losses(self, objective: Objective, batch: Batch) -> Tensor | None:
        if objective.layers is None or self._settings.weight_decay:
            return None
        values, space = list[Tensor](), self._space
        for part in objective.layers.parts(batch):
            recorded = objective.layers.record_losses(part)
            if recorded is None:
                values += map(self.quadratic(), objective.layers.without_layers(part))
                continue
            deltas = recorded.output_gradients()
            total = recorded.value.new_zeros(recorded.size, dtype=torch.float64)
            for block in self.blocks:
                total += _weighted_squares(block, recorded, deltas, space, 1 / self.damped(block.values))
            for name, diagonal in self.diagonal.items():
                gradients = recorded.of_parameter(name, len(diagonal), deltas)
                total += (gradients.square() / self.damped(diagonal)).sum(1)
            values.append(total[: part.size])
        return torch.cat(values)

    def dampings(self) -> Tensor:
        """The damping of each parameter with weight decay, ``(p,)``, which is the same for all entries of a layer."""
        found, space = torch.empty(self._space.size), self._space
        for block in self.blocks:
            for part in block.parts:
                space.of(part.name, found).fill_(self._damping(block.values))
        for name, values in self.diagonal.items():
            space.of(name, found).fill_(self._damping(values))
        return found + self._settings.weight_decay

    @cached_property
    def root(self) -> Callable[[Tensor], Tensor]:
        """The square root of this inverse, which is symmetric, as a map of vectors ``(q, p)``."""
        blocks = [(block, self.damped(block.values).rsqrt()) for block in self.blocks]
        others = {name: self.damped(values).rsqrt() for name, values in self.diagonal.items()}
        return partial(_multiplied, space=self._space, blocks=blocks, diagonal=others)

    @property
    def bases(self) -> list[Tensor]:
        """The matrices of eigenvectors, ``(o, o)`` and ``(i, i)`` of each layer."""
        return [one for block in self.blocks for one in (block.outer, block.inner) if one is not None]

    @property
    def nbytes(self) -> int:
        """The bytes of the factors and of the eigenvalues."""
        values = (block.values for block in self.blocks)
        return sum(tensor.nbytes for tensor in (*self.bases, *values, *self.diagonal.values()))

    @property
    def kind(self) -> str:
        return self.name

    def summary(self) -> dict[str, Any]:
        """The kind of curvature, and how many parameters are in blocks, and how many have the diagonal only."""
        if not any(values.any() for values in (*(block.values for block in self.blocks), *self.diagonal.values())):
            warn_of_zero_curvature()
        diagonal = sum(len(values) for values in self.diagonal.values())
        return {**self._facts, "in_blocks": self._space.size - diagonal, "on_diagonal": diagonal}


def inverse_root(
    objective: Objective, examples: Examples, damping: Tensor, seed: int
) -> Callable[[Tensor], Tensor] | None:
    """The map ``v ↦ (G + D)^(−1/2) v``, where ``G`` is the EK-FAC approximation of the Gauss–Newton matrix.

    With it as a preconditioner from both sides, conjugate gradients take fewer products.

    Args:
        objective: An open objective.
        examples: The examples that ``G`` is the mean over.
        damping: The diagonal ``D``, ``(p,)``. A matrix of a layer gets the mean over its entries.
        seed: The seed of random vectors.

    Returns:
        A function from ``(p,)`` to ``(p,)``; ``None`` if the module does not use all its parameters in layers.
    """
    if objective.layers is None:
        return None
    space = objective.space
    blocks, diagonal, _ = _fit(_Passes(objective, objective.layers, examples, seed, lambda: None))
    roots = [
        (block, (block.values + block.matrix(lambda name: space.of(name, damping[None])).mean()).rsqrt())
        for block in blocks
    ]
    others = {name: (values + space.of(name, damping)).rsqrt() for name, values in diagonal.items()}
    return lambda vector: _multiplied(vector[None], space, roots, others)[0]


def _multiplied(
    vectors: Tensor,
    space: ParameterSpace,
    blocks: Sequence[tuple[KroneckerBlock, Tensor]],
    diagonal: Mapping[str, Tensor],
) -> Tensor:
    """A copy of vectors ``(m, p)`` whose coordinates in the Kronecker basis are multiplied, see _change_in_basis."""
    result = vectors.clone()
    for some in result.split(_TOGETHER):
        _change_in_basis(torch.mul, some, space, blocks, diagonal)
    return result


def _change_in_basis(
    operation: Callable[[Tensor, Tensor], Tensor],
    vectors: Tensor,
    space: ParameterSpace,
    blocks: Iterable[tuple[KroneckerBlock, Tensor]],
    diagonal: Mapping[str, Tensor],
) -> None:
    """Multiplies or divides the coordinates of vectors ``(m, p)`` in the Kronecker basis, in place.

    Args:
        operation: ``torch.mul`` or ``torch.div``.
        vectors: The vectors, in the basis of the parameters before and after.
        space: The parameters.
        blocks: The blocks, each with its factors or divisors, in the shape of its eigenvalues.
        diagonal: Those of the other parameters, by name.
    """
    for block, numbers in blocks:
        rotated = operation(block.rotate(block.matrix(lambda name: space.of(name, vectors))), numbers)
        for part in block.parts:
            space.of(part.name, vectors).zero_()
        block.write(block.rotate_back(rotated), lambda name: space.of(name, vectors))
    for name, numbers in diagonal.items():
        values = space.of(name, vectors)
        values.copy_(operation(values, numbers))


def require_layers(objective: Objective, settings: Settings, method: Method) -> LayerGradients:
    """The layers of the module, which EK-FAC needs.

    Raises:
        ConfigurationError: If the method or the curvature is another one, or if the module has no such layers.
    """
    if method.rows != "all" or method.cols != "all":
        raise ConfigurationError(
            f"solver={settings.solver!r} inverts the curvature of all parameters, so it needs method='if' or 'pif'. For"
            " scores over target parameters, omit `solver`."
        )
    if settings.curvature != "ggn":
        raise ConfigurationError(
            f"solver={settings.solver!r} approximates the Gauss–Newton matrix, got curvature={settings.curvature!r}."
            " Use curvature='ggn', or another solver."
        )
    layers = objective.layers
    if layers is None:
        raise ConfigurationError(
            f"solver={settings.solver!r} needs a module that uses all its parameters in layers that are linear in them,"
            f" for whole batches. {type(objective.module).__name__} does not; recurrent layers, for example, are not"
            " linear in theirs. Omit `solver`."
        )
    assert objective.probed is not None  # since there are layers
    require_gauss_newton(objective, objective.theta, objective.probed)
    return layers


@dataclass
class _Passes:
    """Backward passes over examples, from random vectors at the predictions, see :func:`output_vectors`.

    Attributes:
        n_predictions: The number of predictions for all examples of this process, after an iteration.
    """

    objective: Objective
    layers: LayerGradients
    examples: Examples
    seed: int
    on_product: Callable[[], Any]
    n_predictions: int = 0

    def __iter__(self) -> Iterator[tuple[RecordedPass, list[Tensor], float]]:
        """Yields each pass with the gradients at the results of its layers, and its weight."""
        loss, theta = self.layers.together, self.objective.theta
        count, self.n_predictions = max(_DRAWS // len(self.examples), 1), 0
        for batch in self.examples.local_batches():
            for part, recorded in self.layers.passes(partial(outputs.outputs, loss), batch):
                ids = loss.whole(part).ids
                self.n_predictions += recorded.value.numel()
                at = outputs.loss_sum_at(loss, theta, part)
                vectors = list(output_vectors(at, recorded.value, ids, count=count, seed=self.seed))
                for vector in vectors:
                    yield recorded, recorded.output_gradients(vector, keep=True), 1 / len(vectors)
            self.on_product()


def _fit(passes: _Passes) -> tuple[list[KroneckerBlock], dict[str, Tensor], int]:
    """The blocks, the diagonal of the Gauss–Newton matrix for the other parameters by name, and its largest rank."""
    space, processes, n = passes.objective.space, passes.objective.processes, len(passes.examples)
    theta = passes.objective.theta
    # The first examples, whose uses these are, are the same on all processes.
    blocks = kronecker_blocks(passes.layers.uses.values(), space)
    moments = [_no_moments(block, space, theta) for block in blocks]
    for recorded, deltas, weight in passes:
        for block, (outer, inner) in zip(blocks, moments, strict=True):
            for inputs, slopes in block.sides(recorded, deltas):
                if outer is not None:
                    rows = slopes.flatten(0, 1)
                    outer += weight * (rows.T @ rows)
                if inner is not None:
                    rows = inputs.flatten(0, 1)
                    inner += weight * (rows.T @ rows)
    for block in blocks:
        block.outer, block.inner = _bases(*moments.pop(0), processes)
        block.values = theta.new_zeros(_shape(block, space))
    inside = {part.name for block in blocks for part in block.parts}
    diagonal = {name: theta.new_zeros(slot.size) for name, slot in space.slots.items() if name not in inside}
    for recorded, deltas, weight in passes:
        for block in blocks:
            block.values += weight * sum_of_squares(block, recorded, deltas, space)
        for name, values in diagonal.items():
            values += weight * recorded.of_parameter(name, len(values), deltas).square().sum(0)
    for block in blocks:
        block.values = processes.sum(block.values) / n
        require_finite(block.values, "The curvature")
    rank = int(processes.total(float(passes.n_predictions)))
    return blocks, {name: processes.sum(values) / n for name, values in diagonal.items()}, rank


def _bases(outer: Tensor | None, inner: Tensor | None, processes: ProcessGroup) -> tuple[Tensor | None, Tensor | None]:
    """The eigenvectors of the second moments of both sides; ``None`` for a side that keeps its own basis."""
    outer = None if outer is None else eigenvectors(processes.sum(outer))
    inner = None if inner is None else eigenvectors(processes.sum(inner))
    return outer, inner


def _weighted_squares(
    block: KroneckerBlock, recorded: RecordedPass, deltas: Sequence[Tensor], space: ParameterSpace, weights: Tensor
) -> Tensor:
    """``Σ w (UᵀGV)²`` for the gradient ``G`` ``(o, i)`` of each example, ``(B,)``, with weights ``w`` ``(o, i)``."""
    pairs = _pairs(block, recorded, deltas)
    if pairs is not None:
        left, right = pairs
        return ((left @ weights) * right).sum((1, 2)).clamp_min_(0)  # below zero by rounding
    parts = rotated_gradients(block, recorded, deltas, space)
    return torch.cat([(part.square() * weights).sum((1, 2)) for part in parts])


def sum_of_squares(
    block: KroneckerBlock, recorded: RecordedPass, deltas: Sequence[Tensor], space: ParameterSpace
) -> Tensor:
    """The sum over examples of ``(UᵀGV)²``, ``(o, i)``; of ``G²`` for a block without eigenvectors."""
    pairs = _pairs(block, recorded, deltas)
    if pairs is not None:
        left, right = (side.flatten(0, 1) for side in pairs)
        return (left.T @ right).clamp_min_(0)  # below zero by rounding, where the products of the pairs cancel
    return reduce(torch.add, (part.square().sum(0) for part in rotated_gradients(block, recorded, deltas, space)))


def _pairs(block: KroneckerBlock, recorded: RecordedPass, deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Factors ``(B, P, o)`` and ``(B, P, i)`` of the squares of gradients in the Kronecker basis, for few positions.

    A gradient is ``Σ δ aᵀ`` over positions ``t``. So its square is ``Σ (δₜδₛ)(aₜaₛ)ᵀ`` over ``P`` pairs,
    entry by entry.
    """
    if block.is_table or not _is_used_once(block, recorded):
        return None
    ((inputs, slopes),) = block.sides(recorded, deltas)
    positions = inputs.shape[1]
    if positions > _PAIRED:
        return None
    sides = (slopes, block.outer), (inputs, block.inner)
    left, right = (side if basis is None else side @ basis for side, basis in sides)
    one, other = torch.triu_indices(positions, positions, device=left.device)
    times = 2 - (one == other).to(left)  # a pair of two positions occurs in both orders
    return left[:, one] * left[:, other] * times[:, None], right[:, one] * right[:, other]


def rotated_gradients(
    block: KroneckerBlock, recorded: RecordedPass, deltas: Sequence[Tensor], space: ParameterSpace
) -> Iterator[Tensor]:
    """The gradients of all examples in the Kronecker basis, ``(B, o, i)``, as parts for a few examples each."""
    if block.is_table or not _is_used_once(block, recorded):
        yield block.rotate(block.matrix(lambda name: recorded.of_parameter(name, space.slots[name].size, deltas)))
        return
    ((inputs, slopes),) = block.sides(recorded, deltas)
    rows, columns, positions = slopes.shape[2], inputs.shape[2], inputs.shape[1]
    rotates_sides = positions * (rows**2 + columns**2) < rows * columns * (rows + columns)
    size = max(_PART_BYTES // (rows * columns * inputs.element_size()), 1)
    for some_inputs, some_slopes in zip(inputs.split(size), slopes.split(size), strict=True):
        if rotates_sides:
            sides = (some_slopes, block.outer), (some_inputs, block.inner)
            left, right = (side if basis is None else side @ basis for side, basis in sides)
            yield left.mT @ right
        else:
            yield block.rotate(some_slopes.mT @ some_inputs)


def _is_used_once(block: KroneckerBlock, recorded: RecordedPass) -> bool:
    names = {part.name for part in block.parts}
    return sum(not names.isdisjoint(part.name for part in layer.parts) for layer in recorded.layers) == 1


def _no_moments(block: KroneckerBlock, space: ParameterSpace, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Second moments that are zero; ``None`` for a side that keeps its own basis."""
    rows, columns = _shape(block, space)
    outer = like.new_zeros(rows, rows) if rows <= _LARGEST_SIDE else None
    inner = like.new_zeros(columns, columns) if columns <= _LARGEST_SIDE and not block.is_table else None
    return outer, inner


def _shape(block: KroneckerBlock, space: ParameterSpace) -> tuple[int, int]:
    """The shape ``(o, i)`` or ``(o, i + 1)`` of a block."""
    _, rows, columns = block.matrix(lambda name: torch.empty(1, space.slots[name].size)).shape
    return rows, columns


def eigenvectors(moment: Tensor) -> Tensor:
    """The eigenvectors of a second moment, which has zero rows for inputs that are always zero.

    On such a matrix, LAPACK in float32 may fail, or return NaN without an error. Then they are computed in float64.
    """
    require_finite(moment, "The curvature")
    with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        vectors = torch.linalg.eigh(moment)[1]
        if vectors.isfinite().all():
            return vectors
    return torch.linalg.eigh(moment.double())[1].to(moment)
