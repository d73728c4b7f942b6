"""The selectors: which parameters become targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, SelectionError
from ..parameters import ParameterSpace, Targets, match_names
from ..registry import Registry, declares
from .blocks import Blocks, densest, rows_of
from .statistics import GradientStatistics, NeuronStatistics, n_neurons, neuron_layers, own_parameter

__all__ = [
    "SELECTORS",
    "BlockSelector",
    "Layer",
    "LayerSelector",
    "Selector",
    "check_selector",
    "energy_of",
    "ranks_neurons",
    "select",
    "whole_neurons",
]


# Parameters outside of Linear and Conv layers are ranked too, if these layers give less than this share of the targets.
_COVERED = 0.5


@dataclass(frozen=True)
class Layer:
    """The data of one Linear or Conv layer, or of another parameter, that a selector uses.

    Entries are numbered through the flattened weight and then the bias. Neuron ``i`` of ``n`` owns entries
    ``i·fan_in`` to ``(i+1)·fan_in − 1`` and, if there is a bias, ``n·fan_in + i``.

    Attributes:
        name: The layer's name.
        neurons: The number of neurons ``n``: output features or channels.
        fan_in: The number of weights of one neuron; 0 if the weight is frozen or excluded by ``influence_parameters``.
        bias: Whether there is a bias that is trainable and not excluded.
        outputs: ``|mean output|`` of each neuron, ``(n,)``; ``None`` if unknown.
        gradients: ``|mean output gradient|`` of each neuron, ``(n,)``; ``None`` if unknown.
        entries: The root-mean-square gradient of each entry, ``(size,)``; ``None`` if unknown.
    """

    name: str
    neurons: int
    fan_in: int
    bias: bool
    outputs: Tensor | None = None
    gradients: Tensor | None = None
    entries: Tensor | None = None

    @property
    def size(self) -> int:
        """The number of entries."""
        return self.neurons * (self.fan_in + self.bias)

    def weights_of(self, neurons: Tensor | int) -> Tensor:
        """The numbers ``(n · fan_in,)`` of the entries that are the weights of ``n`` neurons, in their order."""
        first = torch.as_tensor(neurons).reshape(-1, 1) * self.fan_in
        return (first + torch.arange(self.fan_in)).flatten()

    def need(self, kind: str) -> Tensor:
        """Returns a statistic: ``"outputs"``, ``"gradients"`` or ``"entries"``.

        Raises:
            SelectionError: If the statistic is not available.
        """
        value: Tensor | None = getattr(self, kind)
        if value is None:
            cache = "cache_gradients" if kind == "entries" else "cache_neurons"
            raise SelectionError(
                f"The selector needs the {'gradients of the parameters' if kind == 'entries' else kind} of layer"
                f" {self.name!r}, but they are not available: training did not gather them ({cache}=False, or the layer"
                " was not used), and no batch was evaluated for them. Use targets='batch', or a selector that needs no"
                " statistics: 'random', or parameter names."
            )
        return value


LayerSelector = Callable[[Layer, float, torch.Generator], Tensor]
"""``selector(layer, ratio, generator) → entries``: the numbers of the entries that become targets, each once."""

BlockSelector = Callable[[Blocks, float, torch.Generator], Tensor]
"""``selector(blocks, ratio, generator) → chosen``: the numbers of the blocks that become targets, each once."""

Selector = LayerSelector | BlockSelector
"""A selector, which is called for each layer, or once for the blocks of all layers."""

_STATISTICS = ("outputs", "gradients", "entries")

SELECTORS: Registry[Callable[..., Tensor]] = Registry("selector", statistics=_STATISTICS, max_ratio=1.0, energy=None)
"""All selectors by name; add your own with :meth:`Registry.register`.

A selector can declare by :func:`~lightning_gif.registry.declares`: ``statistics``, which of ``"outputs"``,
``"gradients"`` and ``"entries"`` of a :class:`Layer` it uses (by default all; the others may be ``None``), and
``max_ratio``, the largest ``ratio`` that it takes (by default 1). If it declares an
``energy``, it chooses among the :class:`~lightning_gif.selection.blocks.Blocks` of all layers. Then ``energy`` is the
name of the gradient energy, in :data:`~lightning_gif.curvature.energy.ENERGIES`, that the blocks have.
"""


def whole_neurons(layer: Layer, order: Sequence[int], ratio: float, generator: torch.Generator) -> Tensor:
    """Picks ``⌊ratio · size⌋`` entries of a layer as whole neurons, in the given order.

    If the last neuron does not fit as a whole, the remaining entries are drawn from its weights.

    Args:
        layer: The layer.
        order: The neurons in order of preference.
        ratio: Share of the layer's entries, in (0, 1].
        generator: The generator that draws the remaining weights.
    """
    budget = int(ratio * layer.size)
    each = layer.fan_in + layer.bias
    whole, leftover = divmod(budget, each)
    chosen = torch.tensor(order[:whole], dtype=torch.long)
    parts = [layer.weights_of(chosen)]
    if layer.bias:
        parts.append(chosen + layer.neurons * layer.fan_in)
    if leftover and whole < len(order):
        candidates = layer.weights_of(order[whole])
        parts.append(candidates[torch.randperm(len(candidates), generator=generator)[:leftover]])
    return torch.cat(parts)


def _ranked(values: Tensor, *, descending: bool) -> list[int]:
    # A stable sort orders ties (dead neurons) in the same way on every machine.
    order: list[int] = values.cpu().sort(descending=descending, stable=True).indices.tolist()
    return order


def _by_rank(kind: str, *, descending: bool) -> LayerSelector:
    @declares(statistics=(kind,))
    def selector(layer: Layer, ratio: float, generator: torch.Generator) -> Tensor:
        return whole_neurons(layer, _ranked(layer.need(kind), descending=descending), ratio, generator)

    return selector


def _outside_the_top(kind: str) -> LayerSelector:
    @declares(statistics=(kind,), max_ratio=0.5)
    def selector(layer: Layer, ratio: float, generator: torch.Generator) -> Tensor:
        top = int(ratio * layer.size) // (layer.fan_in + layer.bias)
        rest = _ranked(layer.need(kind), descending=True)[top:]
        shuffled = [rest[i] for i in torch.randperm(len(rest), generator=generator).tolist()]
        return whole_neurons(layer, shuffled, ratio, generator)

    return selector


SELECTORS.register("highest_k_outputs")(_by_rank("outputs", descending=True))
SELECTORS.register("highest_k_gradients")(_by_rank("gradients", descending=True))
SELECTORS.register("lowest_k_outputs")(_by_rank("outputs", descending=False))
SELECTORS.register("lowest_k_gradients")(_by_rank("gradients", descending=False))
SELECTORS.register("exclusive_k_outputs")(_outside_the_top("outputs"))
SELECTORS.register("exclusive_k_gradients")(_outside_the_top("gradients"))


@SELECTORS.register("random")
@declares(statistics=())
def random(layer: Layer, ratio: float, generator: torch.Generator) -> Tensor:
    """``⌊ratio · n⌋`` of a layer's ``n`` weights and the same share of its biases, drawn at random."""
    weights = layer.neurons * layer.fan_in
    biases = layer.neurons * layer.bias
    return torch.cat(
        [
            torch.randperm(weights, generator=generator)[: int(ratio * weights)],
            torch.randperm(biases, generator=generator)[: int(ratio * biases)] + weights,
        ]
    )


@SELECTORS.register("threshold")
@declares(statistics=("outputs",))
def threshold(layer: Layer, ratio: float, generator: torch.Generator, *, start: float = 1.0) -> Tensor:
    """Weights and biases drawn from the neurons with an absolute mean output above a threshold.

    In each layer the threshold starts at 1 and is lowered in steps of 0.01, as in the paper's scripts. This ends when
    the neurons above it have at least the share ``ratio`` of the layer's weights and of its biases. As many are drawn.
    """
    outputs = layer.need("outputs").cpu()
    weights, biases = int(ratio * layer.neurons * layer.fan_in), int(ratio * layer.neurons * layer.bias)
    enough = max(-(-weights // layer.fan_in) if layer.fan_in else 0, biases)
    if not enough:
        return torch.empty(0, dtype=torch.long)
    # The number of steps after which enough neurons are above the threshold, computed without a loop.
    last = float(outputs.sort(descending=True).values[enough - 1])
    steps = max(0, int((start - last) / 0.01) + 1) if last <= start else 0
    pool = (outputs > start - 0.01 * steps).nonzero().squeeze(1)
    if len(pool) < enough:  # because ``steps`` is rounded
        pool = outputs.sort(descending=True, stable=True).indices[:enough].sort().values
    owned = layer.weights_of(pool)
    return torch.cat(
        [
            owned[torch.randperm(len(owned), generator=generator)[:weights]],
            pool[torch.randperm(len(pool), generator=generator)[:biases]] + layer.neurons * layer.fan_in,
        ]
    )


@SELECTORS.register("largest_gradients")
@declares(statistics=("entries",))
def largest_gradients(layer: Layer, ratio: float, generator: torch.Generator) -> Tensor:
    """The ``⌊ratio · size⌋`` entries with the largest root-mean-square gradient. Not from the GIF paper."""
    return torch.tensor(_ranked(layer.need("entries"), descending=True)[: int(ratio * layer.size)], dtype=torch.long)


@SELECTORS.register("caps")
@declares(statistics=(), energy="fisher_diagonal")
def caps(blocks: Blocks, ratio: float, generator: torch.Generator) -> Tensor:
    """The blocks with the most gradient energy per entry, with one budget for all layers.

    The energy of an entry is ``g²/(F + λ)``: ``g`` is the gradient of the query or the forget examples, ``F`` the
    diagonal of the Fisher matrix of the training examples, and ``λ`` a damping. Together the blocks have at most
    ``⌊ratio · size⌋`` of all entries that may be changed. So one layer may have all of its entries picked, and another
    none.

    This is a newer selector of the authors of the GIF paper. Theirs divides the budget among the layers by their sizes.
    """
    return densest(blocks, int(ratio * blocks.size))


@SELECTORS.register("ekfac_caps")
@declares(statistics=(), energy="ekfac")
def ekfac_caps(blocks: Blocks, ratio: float, generator: torch.Generator) -> Tensor:
    """As :func:`caps`, with the energy ``gᵀF⁻¹g``, where ``F`` is the EK-FAC approximation of the Gauss–Newton matrix.

    The energy of an entry is its term of this product. This is a newer selector of the authors of the GIF paper. Theirs
    first takes the blocks with the most energy in total, not per entry.
    """
    return densest(blocks, int(ratio * blocks.size))


def energy_of(selector: str | Sequence[str]) -> str | None:
    """The gradient energy by which a selector ranks the blocks of all layers; ``None`` if it picks in each layer.

    Args:
        selector: The name of a selector, or names or patterns of parameters.
    """
    return SELECTORS.declared(SELECTORS[str(selector)], "energy") if is_name(selector) else None


def ranks_neurons(selector: str | Sequence[str]) -> bool:
    """Whether a selector uses statistics of neurons.

    Args:
        selector: The name of a selector, or names or patterns of parameters.
    """
    if not is_name(selector):
        return False
    return not {"outputs", "gradients"}.isdisjoint(SELECTORS.declared(SELECTORS[str(selector)], "statistics"))


def check_selector(selector: str | Sequence[str], ratio: float) -> None:
    """Checks a selector and a ratio as far as possible without a model.

    Args:
        selector: The name of a selector, or names or patterns of parameters.
        ratio: The share of each layer's entries.

    Raises:
        ConfigurationError: For an unknown selector or a ratio out of range.
    """
    if not is_name(selector):
        if not isinstance(selector, (str, Sequence)) or not selector or not all(isinstance(s, str) for s in selector):
            raise ConfigurationError(
                f"`selector` must be the name of a selector, or parameter names or patterns, got {selector!r}."
                f" Selectors: {', '.join(SELECTORS)}."
            )
        most = 1.0
    else:
        most = SELECTORS.declared(SELECTORS[str(selector)], "max_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= most:
        raise ConfigurationError(
            f"`ratio` must be above 0 and at most {most} for selector {selector!r}, got {ratio!r}. It is the share of"
            " the parameters that become targets."
        )


def is_name(selector: str | Sequence[str]) -> bool:
    """Whether ``selector`` is the name of a selector: a string without a dot or wildcard, unlike parameter names."""
    return isinstance(selector, str) and not any(mark in selector for mark in ".*?[")


def select(
    module: nn.Module,
    selector: str | Sequence[str],
    ratio: float,
    *,
    allowed: Sequence[str] = ("*",),
    neurons: NeuronStatistics | None = None,
    gradients: GradientStatistics | None = None,
    classes: Iterable[int] | None = None,
    seed: int = 0,
    energies: Tensor | None = None,
) -> Targets:
    """Picks the target parameters of a model.

    Args:
        module: The model.
        selector: The name of a selector, which is applied to each Linear and Conv layer, or to the blocks of all layers
            at once; or names or patterns of parameters of any kind. All entries of a parameter that matches become
            targets.
        ratio: The share of each layer's entries, or of all entries for a selector that ranks blocks; ignored for names
            and patterns of parameters.
        allowed: Names or patterns of parameters that may be changed (``GIFMixin.influence_parameters``).
        neurons: Statistics that rank neurons.
        gradients: Statistics that rank single entries.
        classes: Rank neurons by examples of these classes only; ``None`` for all classes.
        seed: Seed of all random draws.
        energies: The gradient energy of each parameter, ``(p,)``, by which a selector ranks the blocks of all layers.

    Raises:
        ConfigurationError: For an unknown selector or a ratio out of range.
        SelectionError: If no parameters can be selected, a name matches nothing, or a needed statistic is missing.
    """
    check_selector(selector, ratio)
    space = ParameterSpace(module)
    may_change = set(match_names(space.slots, list(allowed)))
    if not is_name(selector):
        return _named(space, [selector] if isinstance(selector, str) else list(selector), allowed)

    pick = SELECTORS[str(selector)]
    generator = torch.Generator().manual_seed(seed)
    if energy_of(selector) is not None:
        if energies is None:
            raise SelectionError(
                f"The selector {selector!r} ranks parameters by the gradient of the query or the forget examples, but"
                " it was not given. Use targets='batch'."
            )
        named = {name: space.of(name, energies) for name in space.slots if name in may_change}
        return _whole_blocks(Blocks.of(module, named), pick, ratio, generator)
    classes = None if classes is None else sorted(set(classes))
    views = _Views(module, may_change, neurons, gradients, classes, SELECTORS.declared(pick, "statistics"))
    chosen, unknown = views.pick(lambda view: pick(view, ratio, generator))
    if unknown is not None and not neurons:  # nothing was gathered, which is no reason to rank something else
        raise unknown
    total = sum(space.slots[name].size for name in may_change)
    if sum(map(len, chosen.values())) < _COVERED * ratio * total:
        for view, index in _other_units(module, space, may_change - chosen.keys(), gradients):
            try:
                entries = pick(view, ratio, generator)
            except SelectionError as error:
                unknown = unknown or error
                continue
            chosen[view.name] = index[entries]
    if not chosen and unknown is not None:
        raise unknown
    if not chosen:
        raise SelectionError(
            f"{type(module).__name__} has no trainable parameters that influence_parameters includes. Let it include"
            " some."
        )
    return Targets(chosen)


def _named(space: ParameterSpace, patterns: list[str], allowed: Sequence[str]) -> Targets:
    """All entries of the parameters with given names or patterns, see :func:`select`."""
    may_change = set(match_names(space.slots, list(allowed)))
    named = [name for name in match_names(space.slots, patterns) if name in may_change]
    if not named:
        raise SelectionError(
            f"`influence_parameters` {list(allowed)} excludes all parameters that `selector` {patterns} matches."
            " Name other parameters, or let influence_parameters include these."
        )
    return Targets.whole(space, named)


def _whole_blocks(blocks: Blocks, pick: Callable[..., Tensor], ratio: float, generator: torch.Generator) -> Targets:
    """The entries of the blocks that a selector picks.

    Raises:
        SelectionError: If it picks none.
    """
    picked = pick(blocks, ratio, generator)
    if not len(picked):
        raise SelectionError(
            f"The selection is empty: ratio={ratio} allows {int(ratio * blocks.size)} entries, but the smallest"
            f" block has {int(blocks.sizes.min())}. Raise `ratio`, or name parameters explicitly."
        )
    return Targets(blocks.entries(picked))


@dataclass(frozen=True)
class _Views:
    """The Linear and Conv layers of a module, as selectors see them.

    Attributes:
        module: The module.
        may_change: The names of the parameters that may become targets.
        neurons: Statistics that rank neurons.
        gradients: Statistics that rank single entries.
        classes: Rank neurons by examples of these classes only.
        statistics: Which statistics the selector uses.
    """

    module: nn.Module
    may_change: set[str]
    neurons: NeuronStatistics | None
    gradients: GradientStatistics | None
    classes: list[int] | None
    statistics: Sequence[str]

    def pick(self, pick: Callable[[Layer], Tensor]) -> tuple[dict[str, Tensor], SelectionError | None]:
        """The picked entries by parameter; and the error of a layer that has no statistics."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        chosen: dict[str, Tensor] = {}
        unknown: SelectionError | None = None
        for name, layer in neuron_layers(self.module).items():
            # A weight that is computed from other parameters (weight norm, LoRA) is not a parameter itself.
            weight, bias = (names.get(id(own_parameter(layer, kind)), "") for kind in ("weight", "bias"))
            use_weight, use_bias = weight in self.may_change, bias in self.may_change
            if not (use_weight or use_bias) or weight in chosen:
                continue
            view = self._view(layer, name, [weight] * use_weight, [bias] * use_bias)
            try:
                entries = pick(view)
            except SelectionError as error:
                # The layer has no statistics because its forward never ran. Attention output projections and unused
                # heads are such layers. The layer is skipped; it is an error only if no parameter remains.
                unknown = error
                continue
            weights = view.neurons * view.fan_in
            entries = entries.sort().values
            count = int((entries < weights).sum())
            if use_weight:
                chosen[weight] = entries[:count]
            if use_bias:
                chosen[bias] = entries[count:] - weights
        return chosen, unknown

    def _view(self, layer: Any, name: str, weight: list[str], bias: list[str]) -> Layer:
        """One layer with the statistics that the selector uses. The lists hold the names of what may change."""
        means: dict[str, Tensor] = {}
        for kind in ("outputs", "gradients"):
            if self.neurons is not None and kind in self.statistics:
                mean = self.neurons.mean(kind, name, self.classes)
                if mean is not None:
                    means[kind] = mean.abs()
        parts: list[Tensor | None] = []
        if self.gradients and "entries" in self.statistics:
            parts = [self.gradients.root_mean_square(parameter) for parameter in weight + bias]
        known = [part.flatten().cpu() for part in parts if part is not None]
        return Layer(
            name=name,
            neurons=n_neurons(layer),
            fan_in=layer.weight[0].numel() if weight else 0,
            bias=bool(bias),
            entries=torch.cat(known) if known and len(known) == len(parts) else None,
            **means,
        )


def _other_units(
    module: nn.Module, space: ParameterSpace, names: set[str], gradients: GradientStatistics | None
) -> Iterator[tuple[Layer, Tensor]]:
    """Units of parameters that are not in a Linear or Conv layer, each with the flat index of its entries.

    A unit is a row, see :func:`~lightning_gif.selection.blocks.rows_of`. Units are ranked by the root-mean-square
    gradient of their entries.
    """
    for name, parameter in module.named_parameters():
        if name not in names or not parameter.ndim or not parameter.numel():
            continue
        order = rows_of(module, name, parameter)
        entries = gradients.root_mean_square(name) if gradients else None
        entries = None if entries is None else entries.flatten().cpu()[order.flatten()]
        rows = None if entries is None else entries.view_as(order).square().mean(1).sqrt()
        layer = Layer(name, len(order), order.shape[1], False, outputs=rows, gradients=rows, entries=entries)
        yield layer, order.flatten()
