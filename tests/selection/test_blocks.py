"""Blocks of modules of several kinds, and the choice among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_gif import SelectionError
from lightning_gif.selection import SELECTORS, Blocks, energy_of, select
from lightning_gif.selection.blocks import densest

OVER_ALL_LAYERS = [name for name in SELECTORS if energy_of(name) is not None]


class Projections(nn.Module):
    """Attention with two heads that share the keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(4, size) for size in (4, 2, 2, 4))


NETS: dict[str, tuple[Any, list[int]]] = {
    "neurons": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3, bias=False)), [4, 4, 2, 2, 2]),
    "channels": (lambda: nn.Conv2d(4, 2, 3, groups=2), [19, 19]),
    "heads": (lambda: nn.MultiheadAttention(4, 2), [3 * 10, 3 * 10, 5, 5, 5, 5]),
    "heads of two widths": (lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3), [26, 26, 5, 5, 5, 5]),
    "shared keys": (Projections, [10, 10, *[5] * 8]),
    "rows": (lambda: nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)), [2, 2, 2, 1, 1, 1, 1]),
    "outputs": (lambda: nn.ConvTranspose1d(2, 3, 2), [4, 4, 4, 1, 1, 1]),
    "a bias without its weight": (lambda: weight_norm(nn.Linear(3, 2)), [1, 1, 1, 1, 3, 3]),
}


def blocks_of(module: nn.Module, *, without: str = "") -> tuple[Blocks, dict[str, Tensor]]:
    energies = {name: torch.rand(p.numel()) for name, p in module.named_parameters() if name != without}
    return Blocks.of(module, energies), energies


@pytest.mark.parametrize("name", list(NETS))
def test_each_entry_is_in_one_block_which_has_the_sum_of_their_energies(name: str) -> None:
    make, sizes = NETS[name]
    blocks, energies = blocks_of(make())
    assert blocks.sizes.tolist() == sizes
    assert blocks.size == sum(map(len, energies.values()))
    for number in range(len(sizes)):
        entries = blocks.entries(torch.tensor([number]))
        assert sum(map(len, entries.values())) == sizes[number]
        total = sum(float(energies[key][index].double().sum()) for key, index in entries.items())
        assert float(blocks.energies[number]) == pytest.approx(total, rel=1e-12)


def test_a_neuron_has_its_bias_and_a_head_its_rows_of_all_projections() -> None:
    neuron = blocks_of(nn.Linear(3, 2))[0].entries(torch.tensor([1]))
    assert {name: index.tolist() for name, index in neuron.items()} == {"weight": [3, 4, 5], "bias": [1]}
    head = blocks_of(nn.MultiheadAttention(4, 2))[0].entries(torch.tensor([1]))
    assert head["in_proj_bias"].tolist() == [2, 3, 6, 7, 10, 11]
    assert len(head["in_proj_weight"]) == 6 * 4
    column = blocks_of(nn.ConvTranspose1d(2, 3, 2))[0].entries(torch.tensor([1]))
    assert column["weight"].tolist() == [2, 3, 8, 9]


def test_entries_that_may_not_change_are_in_no_block() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    blocks, _ = blocks_of(module, without="0.weight")
    assert blocks.sizes.tolist() == [1, 1, 3, 3]
    tied = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    tied["head"].weight = tied["table"].weight
    assert blocks_of(tied)[0].sizes.tolist() == [4] * 5


def test_the_blocks_with_the_most_energy_for_each_entry_are_taken_until_no_other_fits() -> None:
    sizes = torch.tensor([4, 1, 3, 2, 5, 1])
    blocks = Blocks({}, sizes, torch.tensor([4.0, 3.0, 6.0, 4.0, 20.0, 1.0], dtype=torch.float64))
    assert densest(blocks, 16).tolist() == [4, 1, 2, 3, 0, 5]  # those with equal energies in their order
    assert densest(blocks, 7).tolist() == [4, 1, 5]  # the blocks of 3, 2 and 4 entries do not fit
    assert densest(blocks, 4).tolist() == [1, 2]
    assert densest(blocks, 0).tolist() == []


@pytest.mark.parametrize("selector", OVER_ALL_LAYERS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.77, 1.0])
def test_one_budget_for_all_layers_is_kept_and_used_up_to_a_block(selector: str, ratio: float) -> None:
    module = nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.Linear(9, 5), nn.Embedding(7, 3))
    total = sum(parameter.numel() for parameter in module.parameters())
    targets = select(module, selector, ratio, energies=torch.rand(total))
    assert int(ratio * total) - 10 < targets.count <= int(ratio * total)  # the largest block has 10 entries
    everything = torch.zeros(total)
    everything[-21:] = 1.0  # the embedding
    assert set(select(module, selector, 21.5 / total, energies=everything)) == {"3.weight"}


@pytest.mark.parametrize("selector", OVER_ALL_LAYERS)
def test_without_energies_or_room_for_a_block_there_are_no_targets(selector: str) -> None:
    module = nn.Linear(9, 5)
    with pytest.raises(SelectionError, match="Use targets='batch'"):
        select(module, selector, 0.5)
    with pytest.raises(SelectionError, match=r"allows 5 entries, but the smallest block has 10. Raise `ratio`"):
        select(module, selector, 0.1, energies=torch.rand(50))
