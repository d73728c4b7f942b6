"""Statistics of neurons and parameters, gathered from the forward and backward passes of training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from ..distributed import ProcessGroup
from ..sharding import is_sharded, local, part_of

__all__ = ["GradientStatistics", "NeuronStatistics", "n_neurons", "neuron_layers", "own_parameter"]

_CHANNELS_FIRST = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CHANNELS_FIRST)

# With more positions (pixels, tokens) than this, ``mean`` is faster than a product with a vector.
_MANY = 128

# How many values of neurons are kept before they are summed. Sums of many batches at once take few calls, whose time is
# that of training for small networks.
_KEPT = 2**18


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
    own = layer._parameters  # that of a scripted layer is no dictionary
    return own[name] if name in own else None  # noqa: SIM401


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
    class and, in row 0, for examples of unknown class: ``O(neurons · classes)`` memory. Recorded values are added to
    the sums when there are many, or when a sum is read.

    Attributes:
        outputs: The sums of outputs by layer name, ``(1 + classes, neurons)``.
        gradients: The sums of output gradients by layer name, ``(1 + classes, neurons)``.
        output_counts: The number of examples in each row of ``outputs`` by layer name, ``(1 + classes,)``.
        gradient_counts: The number of examples in each row of ``gradients``. It can differ from ``output_counts``: an
            example may give no gradient, and with activation checkpointing it passes a layer twice.
    """

    _STATE = ("outputs", "gradients", "output_counts", "gradient_counts")

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in self._STATE}
        self._read: list[_Values] = []
        self._n_read = 0
        self._handles: list[RemovableHandle] = []
        self._batch: _BatchRead | None = None
        self._guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def outputs(self) -> dict[str, Tensor]:
        return self._summed("outputs")

    @property
    def gradients(self) -> dict[str, Tensor]:
        return self._summed("gradients")

    @property
    def output_counts(self) -> dict[str, Tensor]:
        return self._summed("output_counts")

    @property
    def gradient_counts(self) -> dict[str, Tensor]:
        return self._summed("gradient_counts")

    def __bool__(self) -> bool:
        return bool(self.output_counts)

    @property
    def has_read(self) -> bool:
        """Whether the hooks have recorded values since the last :meth:`reset`. This takes no sums, unlike ``bool``."""
        return bool(self._read or self._sums["output_counts"])

    def copy(self) -> NeuronStatistics:
        """The same statistics, which a later :meth:`reset` does not clear. The copy has no hooks."""
        made = NeuronStatistics()
        made._sums, made._read, made._n_read = self._sums, self._read, self._n_read
        return made

    def _summed(self, kind: str) -> dict[str, Tensor]:
        self.sum_batches()
        return self._sums[kind]

    def attach(
        self, module: nn.Module, guard: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    ) -> None:
        """Adds hooks to the layers. The hooks only read: training is bit for bit the same as without them.

        They read nothing in layers that run as compiled code.

        Args:
            module: The module with the layers.
            guard: Returns a context manager in which a hook runs, and which handles its errors.
        """
        self.detach()
        self._guard = guard
        for name, layer in neuron_layers(module).items():
            self._handles.append(layer.register_forward_hook(partial(self._after_forward, name)))

    @property
    def is_attached(self) -> bool:
        """Whether there are hooks in at least one layer."""
        return bool(self._handles)

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
        self._batch = _BatchRead(None if classes is None else classes.clone(), size, weight)

    def pause(self) -> None:
        """Stops recording: the hooks ignore all passes from now on."""
        self._batch = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops recording inside the block."""
        before = self._batch
        self.pause()
        try:
            yield
        finally:
            self._batch = before

    def reset(self) -> None:
        """Clears all sums."""
        self._read, self._n_read = [], 0
        self._sums = {kind: {} for kind in self._STATE}

    def sum_batches(self) -> None:
        """Adds the values that hooks have recorded to the sums. Reading a sum does this, too."""
        if not self._read:
            return
        read, self._read, self._n_read = self._read, [], 0
        device = read[0].values.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False):
            alike: dict[tuple[Any, ...], list[_Values]] = {}
            for one in read:
                key = (one.kind, one.name, one.batch is None, one.values.dtype, one.values.device)
                alike.setdefault(key, []).append(one)
            rows_of = _RowsOf()
            for same in alike.values():
                self._add(same, rows_of)

    def sum_over(self, processes: ProcessGroup) -> None:
        """Sums the statistics over all processes, which need not have seen the same layers and classes."""
        self.sum_batches()
        self._sums = {kind: _sum_over(sums, processes) for kind, sums in self._sums.items()}

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
        self.reset()
        self._sums = {kind: {name: value.clone() for name, value in state[kind].items()} for kind in self._STATE}

    def _after_forward(self, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        # While code is compiled, the hook leaves no trace in it: training stays the same, and needs no graph break.
        if torch.compiler.is_compiling():
            return
        if self._batch is not None:
            with self._guard():
                self._see_output(name, layer, output, self._batch)

    def _see_output(self, name: str, layer: nn.Module, output: Any, batch: _BatchRead) -> None:
        if not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return
        if not output.is_floating_point():  # neurons cannot be ranked by complex outputs
            return
        channel = 1 if isinstance(layer, _CHANNELS_FIRST) else -1
        if output.ndim < 2 or (isinstance(layer, _CHANNELS_FIRST) and output.ndim != 2 + len(layer.kernel_size)):
            return  # a single example without a batch dimension
        self._keep("output", name, channel, output, batch, 1.0)
        if output.requires_grad:
            output.register_hook(partial(self._after_backward, name, channel, batch))

    def _after_backward(self, name: str, channel: int, batch: _BatchRead, gradient: Tensor) -> None:
        if torch.compiler.is_compiling() or self._batch is None:  # or an error in the forward pass has ended recording
            return
        with self._guard():
            size = batch.size if batch.size is not None and batch.has_classes_of(gradient) else len(gradient)
            self._keep("gradient", name, channel, gradient, batch, batch.weight * size)

    def _keep(self, kind: str, name: str, channel: int, values: Tensor, batch: _BatchRead, scale: float) -> None:
        """Keeps the values of a layer for one batch. They are copied, since training may overwrite them."""
        values = _per_example(values, channel)
        if scale != 1.0:
            values.mul_(scale)
        self._read.append(_Values(kind, name, values, batch if batch.has_classes_of(values) else None))
        self._n_read += values.numel()
        if self._n_read > _KEPT:  # at once, since the values of one batch may need as much memory as training
            self.sum_batches()

    def _add(self, same: list[_Values], rows_of: _RowsOf) -> None:
        """Adds values of one layer to the rows of their classes, or to row 0. Skips batches with non-finite sums."""
        kind, name = same[0].kind, same[0].name
        values = torch.cat([one.values for one in same])
        # An overflow under loss scaling is not finite: the optimizer skips this step, too.
        if not math.isfinite(float(values.sum())):
            same = [one for one in same if math.isfinite(float(one.values.sum()))]
            if not same:
                return
            values = torch.cat([one.values for one in same])
        rows, counts = rows_of(same)
        total = _rows_for(self._sums[f"{kind}s"], name, len(counts), values)
        # Both add the examples one after the other, so sums do not depend on how many batches are added at once.
        if total.is_cuda:
            total.index_put_((rows,), values.to(total.dtype), accumulate=True)
        else:
            total.index_add_(0, rows, values.to(total.dtype))
        _rows_for(self._sums[f"{kind}_counts"], name, len(counts), values[:, 0])[: len(counts)] += counts


class _BatchRead:
    """The batch that is recorded, see :meth:`NeuronStatistics.record`."""

    def __init__(self, classes: Tensor | None, size: int | None, weight: float) -> None:
        self.classes, self.size, self.weight = classes, size, weight

    def has_classes_of(self, values: Tensor) -> bool:
        """Whether the rows of ``values`` are the examples of the batch, and their classes are known."""
        return self.classes is not None and len(self.classes) == len(values)


class _Values(NamedTuple):
    """Outputs or output gradients of a layer for one batch.

    Attributes:
        kind: ``"output"`` or ``"gradient"``.
        name: The layer's name.
        values: The mean over positions, ``(B, neurons)``.
        batch: The batch, if its rows are those of ``values``, and the classes are known.
    """

    kind: str
    name: str
    values: Tensor
    batch: _BatchRead | None


class _RowsOf:
    """Finds the rows of :class:`NeuronStatistics` sums to which examples are added, once for all layers."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, same: Sequence[_Values]) -> tuple[Tensor, Tensor]:
        """The row of each example, ``(B,)``, and the number of examples of each row."""
        device = same[0].values.device
        known = device, *((id(one.batch), len(one.values)) for one in same)
        if known not in self._known:
            classes = [one.batch.classes for one in same if one.batch is not None and one.batch.classes is not None]
            if classes:
                rows = torch.cat(classes).to(device).long() + 1
            else:
                rows = torch.zeros(sum(len(one.values) for one in same), dtype=torch.long, device=device)
            self._known[known] = rows, rows.bincount()
        return self._known[known]


def _rows_for(sums: dict[str, Tensor], name: str, size: int, like: Tensor) -> Tensor:
    """The sum of this name, after it has got at least ``size`` rows, on the device of the values that are added."""
    old = sums.get(name)
    if old is None:
        sums[name] = like.new_zeros(size, *like.shape[1:])
    elif len(old) < size or old.device != like.device:
        sums[name] = old.new_zeros(max(size, len(old)), *old.shape[1:], device=like.device)
        sums[name][: len(old)] = old.to(like.device)
    return sums[name]


def _per_example(values: Tensor, channel: int) -> Tensor:
    """The mean over positions for each example and neuron, ``(B, neurons)``, in float32 or higher; a copy."""
    values = values.detach()
    narrow = values.dtype in (torch.float16, torch.bfloat16)
    if values.ndim == 2:
        return values.float() if narrow else values.clone()
    with torch.autocast(values.device.type, enabled=False):  # half precision cannot sum thousands
        if narrow:
            values = values.float()
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
        squares: The sum of squared gradients by parameter name, in the parameter's shape; sharded like the parameter.
        steps: The number of optimizer steps in this sum, by parameter name; for sharded parameters in the part of this
            process.
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
        """Adds the gradient of each named parameter. Skips missing, sparse, complex and non-finite gradients.

        Of a sharded gradient, each process skips its own part if that is not finite, since they do not communicate.
        """
        with torch.no_grad():
            gradients = list(gradients)
            for name, gradient in gradients:  # a sum for each, so that all processes have sums of the same parameters
                held = self.squares.get(name)
                if gradient is None or not is_sharded(gradient) or (held is not None and is_sharded(held)):
                    continue
                squares = torch.zeros_like(gradient, dtype=torch.float32)
                if held is not None:  # from a checkpoint
                    local(squares).copy_(part_of(held.to(gradient.device), gradient))
                self.squares[name], self.steps[name] = squares, self.steps.get(name, 0)
            added = {
                name: local(gradient).float()
                for name, gradient in gradients
                if not (gradient is None or gradient.is_sparse or gradient.is_complex())
            }
            if not added:
                return
            norms = torch._foreach_norm(list(added.values()))
            device = norms[0].device
            sizes = torch.stack([norm.to(device) for norm in norms]).tolist()
            # This also skips gradients whose square overflows.
            kept = {
                name: values for (name, values), size in zip(added.items(), sizes, strict=True) if math.isfinite(size)
            }
            old = [name for name in kept if name in self.squares]
            if old:
                values = [kept[name] for name in old]
                torch._foreach_addcmul_([local(self.squares[name]) for name in old], values, values)
            self.squares |= {name: values.square() for name, values in kept.items() if name not in self.squares}
            for name in kept:
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

    def whole(self, processes: ProcessGroup) -> GradientStatistics:
        """The same statistics, of which whole tensors can be read, if parameters are sharded.

        All processes must call it, and read the same tensors in the same order: each is gathered when it is read.
        """
        return _Gathered(self, processes) if any(map(is_sharded, self.squares.values())) else self

    def root_mean_square(self, name: str) -> Tensor | None:
        """The root mean square of each entry of a parameter's gradient; ``None`` if no gradient was added."""
        if not self.steps.get(name):
            return None
        return (self._read(name) / self.steps[name]).sqrt()

    def _read(self, name: str) -> Tensor:
        return self.squares[name]

    def state(self) -> dict[str, dict[str, Any]]:
        """The sums, for a checkpoint."""
        return {"squares": {name: _stored(self._read(name)) for name in self.steps}, "steps": dict(self.steps)}

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


class _Gathered(GradientStatistics):
    """Statistics of sharded parameters, each of which is gathered on the CPU when it is read.

    Args:
        parts: The statistics with sharded tensors.
        processes: The processes that hold the parts.
    """

    def __init__(self, parts: GradientStatistics, processes: ProcessGroup) -> None:
        super().__init__()
        self._parts, self._processes = parts, processes
        for steps in processes.gather(parts.steps):
            self.steps |= {name: max(count, self.steps.get(name, 0)) for name, count in steps.items()}
        self.steps = {name: count for name, count in self.steps.items() if count}

    @override
    def _read(self, name: str) -> Tensor:
        # Parts may have been added up over fewer steps. Their mean squares stay the same.
        squares, share = self._parts.squares[name], self.steps[name] / max(self._parts.steps[name], 1)
        return self._processes.whole(squares if share == 1 else squares * share).cpu()
