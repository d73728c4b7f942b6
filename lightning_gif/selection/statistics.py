"""Statistics of neurons and parameters, gathered from the forward and backward passes of training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from ..distributed import ProcessGroup

__all__ = ["GradientStatistics", "NeuronStatistics", "n_neurons", "neuron_layers", "own_parameter"]

_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CHANNELS_FIRST)

# With more positions (pixels, tokens) than this, ``mean`` is faster than a product with a vector.
_MANY = 128


def neuron_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """The Linear and Conv layers by name, in module order; shared layers appear once."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _LAYERS) and not isinstance(own_parameter(layer, "weight"), UninitializedParameter)
    }


def own_parameter(layer: nn.Module, name: str) -> nn.Parameter | None:
    """A layer's parameter; ``None`` if there is none, or if it is computed from others (weight norm, LoRA).

    Such an attribute must not be read in training: spectral normalisation, for example, changes its buffers then.
    """
    return dict(layer.named_parameters(recurse=False)).get(name)


def n_neurons(layer: nn.Module) -> int:
    """The number of neurons of a Linear or Conv layer."""
    weight = own_parameter(layer, "weight")
    if weight is None:
        size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        return int(size)  # type: ignore[arg-type]
    return weight.shape[0]


class NeuronStatistics:
    """Mean output, and mean gradient of the loss at the output, of every Linear and Conv neuron, by class.

    A neuron's value for one example is the mean over its positions (pixels, tokens). Gradients refer to the loss of the
    single example: the gradient of a batch mean is multiplied by the batch size. Sums are kept in float32 for each
    class and, in row 0, for examples of unknown class: ``O(neurons · classes)`` memory.

    Attributes:
        outputs: The sums of outputs by layer name, ``(1 + classes, neurons)``.
        gradients: The sums of output gradients by layer name, ``(1 + classes, neurons)``.
        output_counts: The number of examples in each row of ``outputs`` by layer name, ``(1 + classes,)``.
        gradient_counts: The number of examples in each row of ``gradients``. It can differ from ``output_counts``: an
            example may give no gradient, and with activation checkpointing it passes a layer twice.
    """

    _STATE = ("outputs", "gradients", "output_counts", "gradient_counts")

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.output_counts: dict[str, Tensor] = {}
        self.gradient_counts: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._rows: _Rows | None = None
        self._size: int | None = None
        self._weight = 1.0
        self._recording = False
        self._guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    def __bool__(self) -> bool:
        return bool(self.output_counts)

    def attach(
        self, module: nn.Module, guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:
        """Adds hooks to the layers. The hooks only read: training is bit for bit the same as without them.

        Args:
            module: The module with the layers.
            guard: Returns a context manager in which a hook runs, and which handles its errors.
        """
        self.detach()
        self._guard = guard
        for name, layer in neuron_layers(module).items():
            self._handles.append(layer.register_forward_hook(partial(self._after_forward, name)))

    def detach(self) -> None:
        """Removes the hooks and ends recording."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.pause()

    def record(self, classes: Tensor | None, size: int | None, weight: float = 1.0) -> None:
        """Starts recording a training batch: the hooks add its outputs and output gradients from now on.

        Args:
            classes: The label of each example, ``(B,)``; ``None`` if unknown.
            size: The number of examples ``B``; ``None`` if unknown.
            weight: Output gradients times this factor are gradients of the batch's mean loss. It undoes gradient
                accumulation and loss scaling.
        """
        self._rows = None if classes is None else _Rows.of(classes)
        self._size = size
        self._weight = weight
        self._recording = True

    def pause(self) -> None:
        """Stops recording: the hooks ignore all passes from now on."""
        self._recording = False
        self._rows = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops recording inside the block."""
        before = self._recording, self._rows
        self.pause()
        try:
            yield
        finally:
            self._recording, self._rows = before

    def reset(self) -> None:
        """Clears all sums."""
        for kind in self._STATE:
            setattr(self, kind, {})

    def sum_over(self, processes: ProcessGroup) -> None:
        """Sums the statistics over all processes, which need not have seen the same layers and classes."""
        for kind in self._STATE:
            setattr(self, kind, _sum_over(getattr(self, kind), processes))

    def mean(self, kind: str, layer: str, classes: Iterable[int] | None = None) -> Tensor | None:
        """The mean over examples of the outputs or output gradients of a layer, ``(neurons,)``.

        Args:
            kind: ``"outputs"`` or ``"gradients"``.
            layer: The layer's name.
            classes: Take the mean over examples of these classes only; over all if ``None``.

        Returns:
            The mean; ``None`` if the layer has seen no example of these classes.
        """
        sums = getattr(self, kind).get(layer)
        if sums is None:
            return None
        counts = (self.output_counts if kind == "outputs" else self.gradient_counts)[layer]
        if classes is not None:
            rows = [c + 1 for c in classes if c + 1 < len(counts)]
            sums, counts = sums[rows], counts[rows]
        total = float(counts.sum())
        return sums.sum(0) / total if total else None

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The sums as tensors on the CPU, for a checkpoint."""
        return {kind: {name: _stored(value) for name, value in getattr(self, kind).items()} for kind in self._STATE}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], module: nn.Module) -> None:
        """Restores what :meth:`state` returned.

        Raises:
            ValueError: If it belongs to another module. Damaged state raises other errors too, such as ``KeyError``.
        """
        layers = neuron_layers(module)
        for kind in ("output", "gradient"):
            sums, counts = state[f"{kind}s"], state[f"{kind}_counts"]
            for name in sums.keys() | counts.keys():
                rows, neurons = sums[name].shape
                if neurons != n_neurons(layers[name]) or counts[name].shape != (rows,):
                    raise ValueError(f"the {kind}s of {name!r} have another shape")
                if not (_sound(sums[name]) and _sound(counts[name]) and (counts[name] >= 0).all()):
                    raise ValueError(f"the {kind}s of {name!r} are not finite floating-point numbers")
        for kind in self._STATE:
            setattr(self, kind, {name: value.clone() for name, value in state[kind].items()})

    # Compiled code would trace the hook's operations. Excluding them costs a graph break.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_forward(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        with self._guard():
            self._see_output(name, layer, output)

    def _see_output(self, name: str, layer: nn.Module, output: Any) -> None:
        if not self._recording or not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return
        if not output.is_floating_point():  # neurons cannot be ranked by complex outputs
            return
        channel = 1 if isinstance(layer, _CHANNELS_FIRST) else -1
        if output.ndim < 2 or (isinstance(layer, _CHANNELS_FIRST) and output.ndim != 2 + len(layer.kernel_size)):
            return  # a single example without a batch dimension
        rows = self._rows_for(output)
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):  # half precision cannot sum thousands
            self._add("output", name, *_summed(_per_example(output, channel), rows))
        if output.requires_grad:
            output.register_hook(partial(self._after_backward, name, channel, rows, self._weight))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_backward(self, name: str, channel: int, rows: _Rows | None, weight: float, gradient: Tensor) -> None:
        if not self._recording:  # an error since the forward pass has ended recording
            return
        with self._guard(), torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            size = self._size if self._size is not None and rows is not None else len(gradient)
            sums, counts, present = _summed(_per_example(gradient, channel), rows)
            self._add("gradient", name, sums.mul_(weight * size), counts, present)

    def _rows_for(self, output: Tensor) -> _Rows | None:
        """The rows for the examples of an output; ``None`` if their classes are not known one by one."""
        if self._rows is None or self._rows.members.shape[1] != len(output):
            return None
        if self._rows.members.device != output.device:
            self._rows = self._rows.to(output.device)
        return self._rows

    def _add(self, kind: str, name: str, sums: Tensor, counts: Tensor, present: _Rows | None) -> None:
        """Adds sums and counts to the rows ``present`` of a layer, or to row 0. Skips non-finite sums."""
        if not math.isfinite(float(sums.sum())):  # an overflow under loss scaling: the optimizer skips this step, too
            return
        rows = 1 if present is None else present.last + 1
        for total, new in ((getattr(self, f"{kind}s"), sums), (getattr(self, f"{kind}_counts"), counts)):
            old = total.get(name)
            new = new if old is None else new.to(old.dtype)
            if old is None or len(old) < rows or old.device != new.device:
                total[name] = new.new_zeros(rows if old is None else max(rows, len(old)), *new.shape[1:])
                if old is not None:
                    total[name][: len(old)] = old.to(new.device)
            if present is None:
                total[name][0] += new[0]
            else:
                total[name].index_add_(0, present.rows, new)


class _Rows(NamedTuple):
    """The rows of :class:`NeuronStatistics` sums to which the examples of a batch are added.

    Attributes:
        rows: The rows of the batch's classes, ``(r,)``.
        members: 1 where an example belongs to a row, else 0, ``(r, B)``. A product with it sums over examples.
        counts: The number of examples in each row, ``(r,)``.
        last: The largest of ``rows``.
    """

    rows: Tensor
    members: Tensor
    counts: Tensor
    last: int

    @classmethod
    def of(cls, classes: Tensor) -> _Rows:
        present, which = classes.long().unique(return_inverse=True)
        members = (which == torch.arange(len(present), device=which.device)[:, None]).float()
        return cls(present + 1, members, members.sum(1), int(present[-1]) + 1)

    def to(self, device: torch.device) -> _Rows:
        return _Rows(self.rows.to(device), self.members.to(device), self.counts.to(device), self.last)


def _summed(values: Tensor, rows: _Rows | None) -> tuple[Tensor, Tensor, _Rows | None]:
    """Sums values ``(B, neurons)`` over the examples of each row.

    Returns:
        The sums ``(r, neurons)``, the number of examples in each row ``(r,)``, and ``rows``. Without rows, r = 1.
    """
    if rows is None:
        return values.sum(0, keepdim=True), values.new_full((1,), len(values)), None
    return rows.members.to(values.dtype) @ values, rows.counts.to(values.dtype), rows


def _per_example(values: Tensor, channel: int) -> Tensor:
    """The mean over positions for each example and neuron, ``(B, neurons)``, in float32 or higher."""
    values = values.detach()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if values.ndim == 2:
        return values
    if channel == -1:
        return values.flatten(1, -2).mean(1)
    values = values.flatten(2)
    count = values.shape[2]
    # Many reductions over few positions each are slower than a product with a vector.
    return values.mean(2) if count > _MANY else values @ values.new_full((count,), 1 / count)


def _sound(value: Tensor) -> bool:
    return value.is_floating_point() and bool(torch.isfinite(value).all())


def _stored(value: Tensor) -> Tensor:
    """A copy on the CPU, since a checkpoint may be written while training adds to the original."""
    return value.detach().to("cpu", copy=True)


def _sum_over(tensors: dict[str, Tensor], processes: ProcessGroup) -> dict[str, Tensor]:
    """Sums over all processes, by name. A process may lack a tensor, or have fewer rows of it."""
    if processes.size == 1:
        return tensors
    known: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for layout in processes.gather({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}):
        for name, (shape, dtype) in layout.items():
            known[name] = max(known.get(name, (shape, dtype)), (shape, dtype), key=lambda one: one[0])
    summed = {}
    for name, (shape, dtype) in known.items():
        own = tensors.get(name)
        total = torch.zeros(shape, dtype=dtype, device=None if own is None else own.device)
        if own is not None and own.shape == total.shape:
            total += own
        elif own is not None:
            total[: len(own)] += own
        summed[name] = processes.sum(total)
    return summed


class GradientStatistics:
    """Mean squares of each parameter's gradient over optimizer steps: ``O(parameters)`` memory.

    Attributes:
        squares: The sum of squared gradients by parameter name, in the parameter's shape.
        steps: The number of optimizer steps in this sum, by parameter name.
    """

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self.steps)

    def reset(self) -> None:
        """Clears all sums."""
        self.squares, self.steps = {}, {}

    def add(self, gradients: Iterable[tuple[str, Tensor | None]]) -> None:
        """Adds the gradient of each named parameter. Skips missing, sparse, complex and non-finite gradients."""
        with torch.no_grad():
            for name, gradient in gradients:
                if gradient is None or gradient.is_sparse or gradient.is_complex():
                    continue
                values = gradient.detach().float()
                if not torch.isfinite(torch.linalg.vector_norm(values)):  # also skips gradients whose square overflows
                    continue
                if name in self.squares:
                    self.squares[name].addcmul_(values, values)
                else:
                    self.squares[name] = values.square()
                self.steps[name] = self.steps.get(name, 0) + 1

    def sum_over(self, processes: ProcessGroup) -> None:
        """Sums over all processes. Use it if each process has evaluated different examples."""
        if processes.size == 1:
            return
        self.squares = _sum_over(self.squares, processes)
        counts: dict[str, int] = {}
        for steps in processes.gather(self.steps):
            for name, count in steps.items():
                counts[name] = counts.get(name, 0) + count
        self.steps = counts

    def root_mean_square(self, name: str) -> Tensor | None:
        """The root mean square of each entry of a parameter's gradient; ``None`` if no gradient was added."""
        if name not in self.squares:
            return None
        return (self.squares[name] / self.steps[name]).sqrt()

    def state(self) -> dict[str, dict[str, Any]]:
        """The sums, for a checkpoint."""
        return {"squares": {name: _stored(value) for name, value in self.squares.items()}, "steps": dict(self.steps)}

    def load_state(self, state: Mapping[str, Mapping[str, Any]], module: nn.Module) -> None:
        """Restores what :meth:`state` returned.

        Raises:
            ValueError: If it belongs to another module. Damaged state raises other errors too, such as ``KeyError``.
        """
        parameters, squares, steps = dict(module.named_parameters()), state["squares"], state["steps"]
        for name in squares.keys() | steps.keys():
            if squares[name].shape != parameters[name].shape or not _sound(squares[name]) or not steps[name] > 0:
                raise ValueError(f"the squared gradients of {name!r} have another shape, or are not finite")
        self.squares = {name: value.clone() for name, value in state["squares"].items()}
        self.steps = {name: int(count) for name, count in state["steps"].items()}
