"""The places where a module uses its parameters linearly, and the gradients of single examples that follow from them.

A backward pass gives the gradient of a loss at the result of such a place. With the input, this is all that the
gradient of a parameter depends on: for a Linear layer it is ``Σ δ aᵀ`` over the positions of an example, with ``a`` the
input and ``δ`` the gradient at the output. So one backward pass over a batch gives the gradients of all its examples.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

__all__ = ["Axis", "Elementwise", "Layer", "LayerRecorder", "Linear", "Part", "Use"]

Edge = tuple[Any, int]
"""A result of an operation in the graph of the backward pass: the node, and the number of the result."""


# With so few outputs, one product with the matrices of all directions is faster than one for each of them: with 10
# outputs by a factor of three. With 128 outputs the others are.
_NARROW = 32

# The bytes of the gradients of examples that are formed at a time for products with directions. On a CPU they stay in
# the cache, and larger allocations take longer than the products: with 256 examples of a layer of 256 x 1152, the
# products with 4 directions take a fifth of the time.
_CACHED, _FORMED = 2**23, 2**28


class Axis(NamedTuple):
    """Where the examples are in a tensor.

    Attributes:
        dim: The dimension of the examples. It may be longer than their number ``B``.
        strided: If it is longer, whether the rows of an example are each ``B``-th one. Otherwise they are consecutive.
    """

    dim: int
    strided: bool = False

    def first(self, values: Tensor, size: int) -> Tensor:
        """The values of each example, ``(B, rows, …)``. The length of the dimension must be a multiple of ``B``."""
        moved = values.movedim(self.dim, 0)
        return moved.unflatten(0, (-1, size)).transpose(0, 1) if self.strided else moved.unflatten(0, (size, -1))


@dataclass(frozen=True, eq=False)
class Part:
    """A view of a parameter.

    Attributes:
        name: The name of the parameter.
        shape: The shape of the view.
        positions: The position of each entry of the view in the flat parameter, ``(m,)``; ``None`` if the view is the
            whole parameter in its own order.
        place: The offset and the strides of the view in memory.
    """

    name: str
    shape: torch.Size
    positions: Tensor | None
    place: tuple[int, ...] = ()

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for equal views."""
        return self.name, *self.shape, *self.place

    def view(self, *shape: int) -> Part:
        """The same entries in another shape."""
        return replace(self, shape=torch.Size(shape))

    def rows(self, indices: Tensor) -> Part:
        """The rows ``(*indices.shape, columns)`` of a table ``(rows, columns)``."""
        positions = (
            torch.arange(self.shape.numel(), device=indices.device) if self.positions is None else self.positions
        )
        shape = torch.Size((*indices.shape, self.shape[1]))
        return Part(self.name, shape, positions.view(self.shape)[indices].reshape(-1), (*self.place, -1))

    def add_to(self, total: Tensor, values: Tensor) -> None:
        """Adds values ``(…, m)`` of the view to values ``(…, size)`` of the flat parameter."""
        if self.positions is None:
            total += values
        else:
            total.index_add_(-1, self.positions, values)

    def of(self, values: Tensor) -> Tensor:
        """The entries ``(…, *shape)`` of the view, from values ``(…, size)`` of the flat parameter."""
        chosen = values if self.positions is None else values[..., self.positions]
        return chosen.reshape(*values.shape[:-1], *self.shape)


class Use(NamedTuple):
    """What a use of parameters is, whatever the batch.

    Attributes:
        kind: The kind of the operation.
        parts: The views of parameters that it uses: the weight, and the bias if there is one.
        groups: The number of groups of a convolution; 1 for other operations.
    """

    kind: str
    parts: list[Part]
    groups: int


class Layer(ABC):
    """One use of parameters by an operation that is linear in them.

    Attributes:
        parts: The views of parameters that it uses.
        shape: The shape of its result.
    """

    kind: ClassVar[str]
    groups: int = 1
    parts: list[Part]

    def __init__(self, output: Tensor) -> None:
        self._edge = torch.autograd.graph.get_gradient_edge(output)
        self.shape = output.shape
        self._itemsize = output.element_size()

    @property
    def edge(self) -> Any:
        """The result in the graph of the backward pass, as ``torch.autograd.grad`` takes it."""
        return self._edge

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for equal uses, whatever the batch."""
        return self.kind, *(part.signature for part in self.parts)

    @property
    def use(self) -> Use:
        return Use(self.kind, self.parts, self.groups)

    def bytes_per_example(self, size: int) -> int:
        """The memory that :meth:`gradients` takes for each of ``size`` examples, apart from its results."""
        return math.prod(self.shape) * self._itemsize // size

    def axes(self, size: int) -> list[Axis]:
        """The axes of the result that may be that of ``size`` examples."""
        found = []
        for dim, length in enumerate(self.shape[: self.n_leading][:2]):
            if length and length % size == 0:
                found += [Axis(dim)] if length == size else [Axis(dim), Axis(dim, strided=True)]
        return found

    @property
    def n_leading(self) -> int:
        """The number of dimensions of the result, without those of the features."""
        return len(self.shape) - 1

    @abstractmethod
    def gradients(self, delta: Tensor, axis: Axis, size: int) -> list[Tensor]:
        """The gradients of single examples for each part, ``(B, *part.shape)``.

        Args:
            delta: The gradient at the result, in its shape.
            axis: Where the examples are, one of :meth:`axes`.
            size: The number of examples ``B``.
        """

    def products(self, delta: Tensor, axis: Axis, size: int, directions: list[Tensor]) -> Tensor:
        """The inner products ``(q, B)`` of the gradients of single examples with directions.

        Args:
            delta: See :meth:`gradients`.
            axis: See :meth:`gradients`.
            size: See :meth:`gradients`.
            directions: For each part, ``(q, *part.shape)``.
        """
        gradients = self.gradients(delta, axis, size)
        pairs = zip(directions, gradients, strict=True)
        rows = ((along.reshape(len(along), -1), one.reshape(size, -1)) for along, one in pairs)
        return sum((along @ one.T for along, one in rows), delta.new_zeros(()))


class Linear(Layer):
    """``y = a Wᵀ`` with ``W`` ``(o, i)``, at each position."""

    kind = "linear"

    def __init__(self, output: Tensor, given: Tensor, weight: Part, bias: Part | None = None) -> None:
        super().__init__(output)
        self._given = given.detach()
        self.weight, self.bias = weight, bias
        self.parts = [weight] if bias is None else [weight, bias]

    def inputs(self, axis: Axis, size: int) -> Tensor:
        """The inputs ``(B, T, i)`` of each example at its ``T`` positions."""
        return _of_examples(self._given, axis, size)

    def outputs(self, delta: Tensor, axis: Axis, size: int) -> Tensor:
        """The output gradients ``(B, T, o)`` of each example at its ``T`` positions."""
        return _of_examples(delta, axis, size)

    def sides(self, delta: Tensor, axis: Axis, size: int) -> tuple[Tensor, Tensor]:
        """:meth:`inputs` and :meth:`outputs`."""
        return self.inputs(axis, size), self.outputs(delta, axis, size)

    @override
    def gradients(self, delta: Tensor, axis: Axis, size: int) -> list[Tensor]:
        inputs, outputs = self.sides(delta, axis, size)
        weight = (outputs.mT @ inputs).reshape(size, *self.weight.shape)
        return [weight] if self.bias is None else [weight, outputs.sum(1)]

    @override
    def products(self, delta: Tensor, axis: Axis, size: int, directions: list[Tensor]) -> Tensor:
        count, positions = len(directions[0]), math.prod(self.shape) // (size * self.weight.shape[0])
        if count * positions <= count + positions:  # the multiplications for each entry of the matrix
            return self._along(delta, axis, size, directions)
        if self.groups > 1:
            return super().products(delta, axis, size, directions)
        inputs, outputs = self.sides(delta, axis, size)
        room = _CACHED if delta.device.type == "cpu" else _FORMED
        rows = max(room // max(size * inputs.shape[2] * inputs.element_size(), 1), 1)
        pairs = zip(directions[0].flatten(2).split(rows, 1), outputs.split(rows, 2), strict=True)
        found = sum((along.flatten(1) @ (some.mT @ inputs).flatten(1).T for along, some in pairs), delta.new_zeros(()))
        return found if self.bias is None else found + directions[1] @ outputs.sum(1).T

    def _along(self, delta: Tensor, axis: Axis, size: int, directions: list[Tensor]) -> Tensor:
        """The products of :meth:`products` from the derivatives of the result along the directions."""
        inputs, outputs = (side.flatten(0, 1) for side in self.sides(delta, axis, size))
        matrix = directions[0].flatten(2)
        if matrix.shape[1] > _NARROW:
            found = ((inputs @ matrix.mT) * outputs).sum(2)
        else:
            images = (inputs @ matrix.flatten(0, 1).T).unflatten(1, (len(matrix), -1))  # (B·T, q, o)
            found = (images @ outputs[..., None]).squeeze(2).T
        found = found if self.bias is None else found + directions[1] @ outputs.T
        return found.unflatten(1, (size, -1)).sum(2)


class Convolution(Linear):
    """A convolution. A position is a pixel, and its input is the patch that the kernel sees."""

    kind = "convolution"

    def __init__(
        self,
        output: Tensor,
        given: Tensor,
        weight: Part,
        bias: Part | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> None:
        super().__init__(output, given, weight, bias)
        self._geometry = tuple(weight.shape[2:]), stride, padding, dilation
        self.groups = groups

    @property
    @override
    def n_leading(self) -> int:
        return 1

    @override
    def inputs(self, axis: Axis, size: int) -> Tensor:
        patches = _patches(self._given, *self._geometry)  # (N, i, T)
        return _of_examples(patches.mT, axis, size)

    @override
    def outputs(self, delta: Tensor, axis: Axis, size: int) -> Tensor:
        return _of_examples(delta.flatten(2).mT, axis, size)

    @override
    def gradients(self, delta: Tensor, axis: Axis, size: int) -> list[Tensor]:
        inputs, outputs = self.sides(delta, axis, size)
        grouped = [side.unflatten(2, (self.groups, -1)).transpose(1, 2) for side in (inputs, outputs)]
        weight = (grouped[1].mT @ grouped[0]).reshape(size, *self.weight.shape)
        return [weight] if self.bias is None else [weight, outputs.sum(1)]

    @override
    def _along(self, delta: Tensor, axis: Axis, size: int, directions: list[Tensor]) -> Tensor:
        _, stride, padding, dilation = self._geometry
        biases = [None] * len(directions[0]) if self.bias is None else directions[1]
        found = []
        for kernel, bias in zip(directions[0], biases, strict=True):
            image = torch.convolution(
                *(self._given, kernel, bias, stride, padding, dilation), False, [0] * len(stride), self.groups
            )
            found.append((image * delta).flatten(1).sum(1))
        return axis.first(torch.stack(found, 1), size).sum(1).T

    @override
    def bytes_per_example(self, size: int) -> int:
        values = self.weight.shape[1:].numel() * self.groups + self.weight.shape[0]
        return self.shape[0] * math.prod(self.shape[2:]) * values * self._itemsize // size


class Embedding(Layer):
    """``y = W[indices]``, with ``W`` ``(rows, e)``."""

    kind = "embedding"

    def __init__(self, output: Tensor, indices: Tensor, weight: Part, padding: int | None) -> None:
        super().__init__(output)
        self._indices, self._padding = indices, padding
        self.weight = weight
        self.parts = [weight]

    @property
    def rows(self) -> Part | None:
        """The rows that were looked up; ``None`` if there is padding among them, which has no gradient."""
        has_padding = self._padding is not None and bool((self._indices == self._padding).any())
        return None if has_padding else self.weight.rows(self._indices)

    def sides(self, delta: Tensor, axis: Axis, size: int) -> tuple[Tensor, Tensor]:
        """The indices ``(B, T)`` and the output gradients ``(B, T, e)``; those of padding are zero."""
        indices = _of_examples(self._indices[..., None], axis, size).squeeze(2)
        outputs = _of_examples(delta, axis, size)
        if self._padding is not None:
            outputs = outputs * (indices != self._padding)[..., None]
        return indices, outputs

    @override
    def gradients(self, delta: Tensor, axis: Axis, size: int) -> list[Tensor]:
        indices, outputs = self.sides(delta, axis, size)
        gradient = outputs.new_zeros(size, *self.weight.shape)
        return [gradient.scatter_add_(1, indices[..., None].expand_as(outputs), outputs)]

    @override
    def products(self, delta: Tensor, axis: Axis, size: int, directions: list[Tensor]) -> Tensor:
        indices, outputs = self.sides(delta, axis, size)
        if indices.shape[1] > len(directions[0][0]):
            return super().products(delta, axis, size, directions)
        return torch.stack([(table[indices] * outputs).sum((1, 2)) for table in directions[0]])


class Elementwise(Layer):
    """``y = x ∘ w`` or ``y = x ± w``, where ``w`` is broadcast to the shape of the result."""

    kind = "elementwise"

    def __init__(self, output: Tensor, part: Part, factor: Tensor | float) -> None:
        super().__init__(output)
        self._factor = factor.detach() if isinstance(factor, Tensor) else factor
        self.parts = [part]

    @property
    def _broadcast(self) -> list[int]:
        """The shape of the part with a dimension for each one of the result."""
        return [1] * (len(self.shape) - len(self.parts[0].shape)) + list(self.parts[0].shape)

    @property
    @override
    def n_leading(self) -> int:
        return len(self.shape)

    @override
    def axes(self, size: int) -> list[Axis]:
        shape = self._broadcast
        return [axis for axis in super().axes(size) if len(shape) == len(self.shape) and shape[axis.dim] == 1]

    @override
    def gradients(self, delta: Tensor, axis: Axis, size: int) -> list[Tensor]:
        (part,), shape = self.parts, self._broadcast
        values = (delta * self._factor).expand(self.shape)
        del shape[axis.dim]
        rows = axis.first(values, size).sum(1)
        summed = [dim for dim, length in enumerate(shape, 1) if length == 1]
        return [(rows.sum(summed, keepdim=True) if summed else rows).reshape(size, *part.shape)]


class _Call(NamedTuple):
    """Where a recorded operation begins in the graph of the backward pass.

    Attributes:
        parts: The edges of the parts of its layers.
        inputs: The edges of its other arguments.
    """

    parts: set[Edge]
    inputs: set[Edge]


class Trace(NamedTuple):
    """What the graph of a backward pass shows.

    Attributes:
        is_complete: Whether the recorded layers are all uses of the parameters.
        moves: Whether values may be moved in a way that depends on data, such as sorting or masking.
    """

    is_complete: bool
    moves: bool


class LayerRecorder(TorchFunctionMode):
    """A block that records where parameters are used linearly.

    Uses by other operations are not recorded. :meth:`trace` tells whether there are any.

    Attributes:
        layers: The uses, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self._parameters: dict[int, tuple[str, Tensor]] = {}
        self._views: dict[int, Tensor] = {}  # results that are views of parameters, but layers of their own
        self._looked_up: dict[int, tuple[Tensor, Embedding]] = {}  # results of embeddings
        self._calls: dict[Any, _Call] = {}

    def note_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes the tensors by name that are the parameters from now on; each has a storage of its own."""
        self._parameters |= {
            tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in parameters.items() if tensor.numel()
        }

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operation = _OPERATIONS.get(name)
        if operation is None or not torch.is_grad_enabled():
            inside = _without_overrides(func)
            if inside is None:
                return func(*args, **kwargs)
            with self:
                return inside(*args, **kwargs)
        constructors, edges = list[Callable[[Tensor], Layer]](), list[tuple[str | None, Edge]]()
        # Other arguments are a TypeError. Inside of vmap, tensors have no storage, which is a RuntimeError.
        with contextlib.suppress(TypeError, RuntimeError):
            constructors += operation(self, *args, **kwargs)
            edges = self._edges(*args, **kwargs) if constructors else []
        result = func(*args, **kwargs)
        if constructors and isinstance(result, Tensor) and result.requires_grad:
            self._add([make(result) for make in constructors], edges)
            if name in _VIEWS:
                self._views[id(result)] = result
            if isinstance(self.layers[-1], Embedding):
                self._looked_up[id(result)] = result, self.layers[-1]
        return result

    def _edges(self, *args: Any, **kwargs: Any) -> list[tuple[str | None, Edge]]:
        """The edges of the arguments of an operation, each with the name of the parameter that the argument is of."""
        found = list[tuple[str | None, Edge]]()
        for given in (*args, *kwargs.values()):
            for one in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(one, Tensor) and one.requires_grad:
                    looked_up = self._looked_up.get(id(one))
                    part = self.part(one) if looked_up is None else looked_up[1].weight
                    found.append((None if part is None else part.name, _edge(one)))
        return found

    def _add(self, layers: list[Layer], edges: list[tuple[str | None, Edge]]) -> None:
        """Adds the layers of one operation with the edges of its arguments."""
        self.layers += layers
        used = Counter(part.name for layer in layers for part in layer.parts)
        call = self._calls.setdefault(layers[0].edge.node, _Call(set(), set()))
        for name, edge in edges:
            is_part = name is not None and used[name] > 0
            used[name or ""] -= is_part
            (call.parts if is_part else call.inputs).add(edge)

    def trace(self, value: Tensor, theta: Tensor) -> Trace:
        """Follows the graph of the backward pass of a value.

        Args:
            value: The value. It requires a gradient.
            theta: The leaf tensor that all parameters are computed from.
        """
        leaf, moves = _edge(theta)[0], False
        waiting, seen = [_edge(value)[0]], set[Any]()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node is leaf:
                return Trace(is_complete=False, moves=moves)
            call = self._calls.get(node)
            if call is None:
                moves = moves or _moves(node)
                waiting += [following for following, _ in node.next_functions if following is not None]
                continue
            within, stop = [node], call.inputs | call.parts
            while within:  # the nodes of the operation itself
                for edge in within.pop().next_functions:
                    if edge[0] is leaf or (edge in call.inputs):
                        waiting.append(edge[0])
                    elif edge[0] is not None and edge not in stop:
                        within.append(edge[0])
        return Trace(is_complete=True, moves=moves)

    def without_examples(self, tensor: Any, other: Any) -> Part | None:
        """The part of a parameter that a tensor is, if it is the same for all examples of another tensor.

        It is a view of a parameter, or rows of a table, such as those of positions, that are broadcast over examples.
        """
        part = self.part(tensor)
        looked_up = self._looked_up.get(id(tensor))
        if part is not None or looked_up is None or not isinstance(other, Tensor):
            return part
        is_broadcast = tensor.ndim < other.ndim or (tensor.ndim == other.ndim and len(tensor) == 1 < len(other))
        if not is_broadcast:
            return None
        layer = looked_up[1]
        rows = layer.rows
        if rows is not None and layer in self.layers:
            self.layers.remove(layer)
            del self._calls[layer.edge.node]
        return rows

    def part(self, tensor: Any) -> Part | None:
        """The part of a parameter that a tensor is a view of; ``None`` if it is not."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.requires_grad:
            return None
        if id(tensor) in self._views:
            return None
        found = self._parameters.get(tensor.untyped_storage().data_ptr())
        if found is None or found[1].dtype != tensor.dtype:
            return None
        name, parameter = found
        if tensor.shape == parameter.shape and tensor.stride() == parameter.stride():
            return Part(name, tensor.shape, None)
        stored = torch.empty_strided(parameter.shape, parameter.stride(), dtype=torch.long, device=tensor.device)
        stored.copy_(torch.arange(parameter.numel(), device=tensor.device).view(parameter.shape))
        positions = stored.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        place = int(tensor.storage_offset()), *tensor.stride()
        return Part(name, tensor.shape, positions.reshape(-1), place)


def _edge(tensor: Tensor) -> Edge:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


# Operations that move values to places that depend on data, by their names in the graph of the backward pass.
_MOVES = {
    *("CopySlices", "Embedding", "EmbeddingBag", "Gather", "IndexAdd", "IndexCopy", "IndexFill", "Index", "IndexPut"),
    *("IndexReduce", "IndexSelect", "MaskedScatter", "MaskedSelect", "PackPaddedSequence", "Put", "Scatter"),
    *("ScatterAdd", "ScatterReduce", "SegmentReduce", "Sort", "SparseMask", "Take", "Topk"),
}


def _moves(node: Any) -> bool:
    """Whether an operation may move values in a way that depends on data: also one that is written by a user."""
    name = node.name().rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")
    if name in _MOVES or isinstance(node, torch.autograd.function.BackwardCFunction):
        return True
    return name == "Cat" and node._saved_dim == 0  # of parts that may have any lengths


# ----------------------------------------------------------------------------------------------------------------------
# The operations that are linear in parameters: which layers they are, given their arguments
# ----------------------------------------------------------------------------------------------------------------------

Constructors = Iterable[Callable[[Tensor], Layer]]
"""Functions from the result of an operation to its layers."""


def _linear(recorder: LayerRecorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Constructors:
    matrix, added = recorder.part(weight), recorder.part(bias)
    if matrix is not None and len(matrix.shape) == 2:
        yield lambda output: Linear(output, input, matrix, added)
    elif added is not None:
        yield lambda output: Elementwise(output, added, 1.0)


def _matmul(recorder: LayerRecorder, input: Tensor, other: Tensor) -> Constructors:
    if isinstance(other, Tensor) and other.ndim == 2:
        yield from _linear(recorder, input, other.mT)


def _addmm(recorder: LayerRecorder, input: Tensor, mat1: Tensor, mat2: Tensor) -> Constructors:
    yield from _linear(recorder, mat1, mat2.mT, input)


def _conv(
    recorder: LayerRecorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Constructors:
    kernel, added, dims = recorder.part(weight), recorder.part(bias), weight.ndim - 2
    if input.ndim != weight.ndim:
        return
    if kernel is None:
        if added is not None:
            yield partial(Elementwise, part=added.view(*added.shape, *(1,) * dims), factor=1.0)
        return
    stride, dilation = _each(stride, dims), _each(dilation, dims)
    sizes = weight.shape[2:]
    if padding == "same":
        total = [spread * (size - 1) for spread, size in zip(dilation, sizes, strict=True)]
        input = F.pad(input, [half for length in reversed(total) for half in (length // 2, length - length // 2)])
    padding = (0,) * dims if isinstance(padding, str) else _each(padding, dims)
    yield lambda output: Convolution(output, input, kernel, added, stride, padding, dilation, groups)


def _embedding(
    recorder: LayerRecorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Constructors:
    table = recorder.part(weight)
    if table is None or scale_grad_by_freq or max_norm is not None:
        return
    padding = None if padding_idx is None or padding_idx == -1 else padding_idx % len(weight)
    yield lambda output: Embedding(output, input, table, padding)


def _add(recorder: LayerRecorder, input: Any, other: Any, *, alpha: float = 1, sign: float = 1.0) -> Constructors:
    parts = recorder.without_examples(input, other), recorder.without_examples(other, input)
    for part, factor in zip(parts, (1.0, sign * alpha), strict=True):
        if part is not None:
            yield partial(Elementwise, part=part, factor=factor)


def _sub(recorder: LayerRecorder, input: Any, other: Any, *, alpha: float = 1) -> Constructors:
    yield from _add(recorder, input, other, alpha=alpha, sign=-1.0)


def _mul(recorder: LayerRecorder, input: Any, other: Any) -> Constructors:
    parts = recorder.part(input), recorder.part(other)
    for part, factor in zip(parts, (other, input), strict=True):
        if part is not None:
            kept = factor.detach().clone() if isinstance(factor, Tensor) else factor
            yield partial(Elementwise, part=part, factor=kept)


def _expand(recorder: LayerRecorder, input: Tensor, *sizes: Any, **named: Any) -> Constructors:
    part = recorder.part(input)
    if part is not None:
        yield lambda output: Elementwise(output, part, 1.0)


def _affine(
    recorder: LayerRecorder, normalised: Tensor, weight: Tensor | None, bias: Tensor | None, after: int = 0
) -> Constructors:
    """A factor and a summand whose last dimension has ``after`` dimensions of the result after it."""
    for one, factor in ((recorder.part(weight), normalised), (recorder.part(bias), 1.0)):
        if one is not None:
            part = one.view(*one.shape, *(1,) * after)
            yield partial(Elementwise, part=part, factor=factor)


def _layer_norm(
    recorder: LayerRecorder,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Constructors:
    normalised = F.layer_norm(input.detach(), normalized_shape, None, None, eps)
    yield from _affine(recorder, normalised, weight, bias)


def _rms_norm(
    recorder: LayerRecorder,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Constructors:
    normalised = F.rms_norm(input.detach(), normalized_shape, None, eps)
    yield from _affine(recorder, normalised, weight, None)


def _group_norm(
    recorder: LayerRecorder,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Constructors:
    normalised = F.group_norm(input.detach(), num_groups, None, None, eps)
    yield from _affine(recorder, normalised, weight, bias, input.ndim - 2)


def _batch_norm(
    recorder: LayerRecorder,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Constructors:
    if training or running_mean is None or running_var is None:
        return  # the loss of an example depends on the others
    normalised = F.batch_norm(input.detach(), running_mean, running_var, None, None, False, momentum, eps)
    yield from _affine(recorder, normalised, weight, bias, input.ndim - 2)


def _prelu(recorder: LayerRecorder, input: Tensor, weight: Tensor) -> Constructors:
    slope = recorder.part(weight)
    if slope is not None:
        after = input.ndim - 2 if weight.numel() > 1 else 0
        below = input.detach().clamp_max(0)
        yield lambda output: Elementwise(output, slope.view(len(weight), *(1,) * after), below)


_OPERATIONS: dict[str, Callable[..., Constructors]] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "__matmul__"), _matmul),
    "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    "embedding": _embedding,
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _add),
    **dict.fromkeys(("sub", "sub_", "__sub__", "__isub__"), _sub),
    **dict.fromkeys(("mul", "mul_", "__mul__", "__rmul__", "__imul__"), _mul),
    **dict.fromkeys(("expand", "expand_as"), _expand),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "prelu": _prelu,
}

_VIEWS = {"expand", "expand_as"}


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _without_overrides(func: Any) -> Callable[..., Any] | None:
    """A function of PyTorch that is written in Python, as a copy that calls others where a mode can see them.

    Such a function passes itself to the mode first. Its copy does not, as if no argument had overrides.
    """
    code, module = getattr(func, "__code__", None), getattr(func, "__globals__", None)
    if code is None or module is None or module.get("__name__") != F.__name__ or func.__closure__:
        return None
    if func not in _COPIES:
        tests = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
        copy = type(func)(code, {**module, **dict.fromkeys(tests, lambda *_: False)}, func.__name__, func.__defaults__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _COPIES[func] = copy
    return _COPIES[func]


_COPIES: dict[Any, Callable[..., Any]] = {}


def _of_examples(values: Tensor, axis: Axis, size: int) -> Tensor:
    """Values with the features last as ``(B, T, features)``."""
    return axis.first(values, size).reshape(size, -1, values.shape[-1])


def _patches(
    given: Tensor, sizes: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """What the kernel of a convolution sees at each position: ``(B, channels · kernel, positions)``."""
    if len(sizes) == 2:
        return F.unfold(given, sizes, dilation, padding, stride)
    if len(sizes) == 1:
        return F.unfold(given[:, :, None], (1, *sizes), (1, *dilation), (0, *padding), (1, *stride))
    given = F.pad(given, [length for length in reversed(padding) for _ in range(2)])
    for dim, (size, step, spread) in enumerate(zip(sizes, stride, dilation, strict=True), 2):
        given = given.unfold(dim, spread * (size - 1) + 1, step)[..., ::spread]
    dims = len(sizes)
    batch, _, *rest = given.shape
    positions = math.prod(rest[:dims])
    moved = given.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims))
    return moved.reshape(batch, -1, positions)
