"""Blocks: entries that become targets together, and the choice among the blocks of all layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .statistics import neuron_layers, own_parameter

__all__ = ["Blocks", "densest", "rows_of"]

# The projections of attention in a module of their own, by name, and the attributes that give their number of heads.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")

# The weights of torch.nn.MultiheadAttention, each with the number of projections that are stacked in it.
_STACKED = {"in_proj_weight": 3, "in_proj_bias": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1}


@dataclass(frozen=True)
class Blocks:
    """All entries that may become targets, in blocks.

    A block is a neuron with its bias, a head of an attention layer, or a row of any other parameter. A head has its
    rows of the query, key and value projections.

    Attributes:
        numbers: The number of the block of each entry, by parameter, ``(size,)``.
        sizes: The number of entries of each block, ``(b,)``.
        energies: The sum of the gradient energies of the entries of each block, ``(b,)`` in float64.
    """

    numbers: dict[str, Tensor]
    sizes: Tensor
    energies: Tensor

    @classmethod
    def of(cls, module: nn.Module, energies: Mapping[str, Tensor]) -> Blocks:
        """The blocks of some parameters of a module.

        Args:
            module: The module.
            energies: The gradient energy of each entry of these parameters, by name, ``(size,)``.
        """
        numbers, count = _numbers(module, set(energies))
        sizes, sums = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.float64)
        for name, of_entries in numbers.items():
            sizes += torch.bincount(of_entries, minlength=count)
            sums.index_add_(0, of_entries, energies[name].cpu().double())
        kept = sizes > 0
        renumbered = kept.cumsum(0) - 1
        return cls({name: renumbered[of] for name, of in numbers.items()}, sizes[kept], sums[kept])

    @property
    def size(self) -> int:
        """The number of entries of all blocks."""
        return int(self.sizes.sum())

    def entries(self, chosen: Tensor) -> dict[str, Tensor]:
        """The flat indices of the entries of the chosen blocks, by parameter.

        Args:
            chosen: The numbers of the blocks.
        """
        picked = torch.zeros(len(self.sizes), dtype=torch.bool)
        picked[chosen] = True
        return {name: picked[of].nonzero().squeeze(1) for name, of in self.numbers.items()}


def densest(blocks: Blocks, budget: int) -> Tensor:
    """The blocks with the most gradient energy for each entry, as many as have no more than ``budget`` entries.

    Blocks are taken in this order, whole. A block that no longer fits is left out, and smaller ones may follow. This is
    the greedy rule for the most energy within the budget. Equal blocks are taken in the order of the module.

    Args:
        blocks: The blocks of all layers.
        budget: The largest number of entries.

    Returns:
        The numbers of the blocks, in the order in which they were taken.
    """
    order = (blocks.energies / blocks.sizes).sort(descending=True, stable=True).indices
    chosen, left = [], budget
    for block, size in zip(order.tolist(), blocks.sizes[order].tolist(), strict=True):
        if size <= left:
            chosen.append(block)
            left -= size
    return torch.tensor(chosen, dtype=torch.long)


def rows_of(module: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The flat indices of the entries of a parameter outside of Linear and Conv layers, by row, ``(rows, columns)``.

    A row is an output of a layer with the layout in × out, known by the length of its bias, as of a transposed
    convolution. In any other parameter it is an index of the first dimension: a gate of a recurrent layer, a token of
    an embedding, a scale of a normalisation.
    """
    order = torch.arange(parameter.numel()).view(parameter.shape)
    bias = own_parameter(module.get_submodule(name.rpartition(".")[0]), "bias")
    if parameter.ndim > 1 and bias is not None and _is_output(bias, parameter):
        order = order.transpose(0, 1)
    return order.reshape(len(order), -1)


def _is_output(bias: Tensor, weight: Tensor) -> bool:
    """Whether a bias belongs to the second dimension of a weight, and not to its first."""
    return bias.ndim == 1 and len(bias) == weight.shape[1] != weight.shape[0]


def _numbers(module: nn.Module, allowed: set[str]) -> tuple[dict[str, Tensor], int]:
    """The number of the block of each entry, by parameter in the order of the module; and the number of blocks.

    Blocks are numbered in the order of the module. There may be numbers without an entry.
    """
    named = dict(module.named_parameters())
    found: dict[str, Tensor] = {}
    count = 0
    for rows in _grouped_rows(module):
        groups = 1 + max((int(of_rows.max()) for _, of_rows in rows), default=-1)
        for name, of_rows in rows:
            if name in allowed and name not in found:
                found[name] = count + of_rows.repeat_interleave(named[name].numel() // len(of_rows))
        count += groups
    for name, parameter in named.items():
        if name in allowed and name not in found and parameter.numel():
            rows_ = rows_of(module, name, parameter if parameter.ndim else parameter[None])
            numbers = torch.empty(parameter.numel(), dtype=torch.long)
            numbers[rows_.flatten()] = count + torch.arange(len(rows_)).repeat_interleave(rows_.shape[1])
            found[name], count = numbers, count + len(rows_)
    return {name: found[name] for name in named if name in found}, count


def _grouped_rows(module: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Yields parameters whose rows belong together, each with the number of the group of each row."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}

    def own(layer: nn.Module, kinds: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        return [
            (names[id(parameter)], of_rows)
            for kind, of_rows in kinds.items()
            if (parameter := own_parameter(layer, kind)) is not None and id(parameter) in names
        ]

    layers = neuron_layers(module)
    taken: set[str] = set()
    for path, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention):
            heads = torch.arange(part.num_heads).repeat_interleave(part.head_dim)
            yield own(part, {kind: heads.repeat(count) for kind, count in _STACKED.items()})
            continue
        projections = _projections(path, part, layers)
        taken.update(projections)
        if projections:
            yield [pair for name, of_rows in projections.items() for pair in own(layers[name], _both(of_rows))]
        elif path in layers and path not in taken:
            layer = layers[path]
            rows = next((len(p) for kind in ("weight", "bias") if (p := own_parameter(layer, kind)) is not None), 0)
            yield own(layer, _both(torch.arange(rows)))


def _both(of_rows: Tensor) -> dict[str, Tensor]:
    return {"weight": of_rows, "bias": of_rows}


def _projections(path: str, part: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The Linear layers that project to the heads of an attention module, each with the head of each of its rows."""
    heads = next((n for kind in _HEADS if isinstance(n := getattr(part, kind, None), int) and n > 0), None)
    if heads is None:
        return {}
    found = {}
    for kind, child in part.named_children():
        name = f"{path}.{kind}" if path else kind
        if kind in _PROJECTIONS and isinstance(child, nn.Linear) and name in layers:
            found[name] = child.out_features
    most = max(found.values(), default=0)
    if most % heads:
        return {}
    # Fewer rows than those of the queries are shared by several heads.
    of_rows = torch.arange(heads).repeat_interleave(most // heads)
    return {name: of_rows for name, rows in found.items() if rows == most}
