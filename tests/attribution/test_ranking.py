"""The ends of a ranking do not depend on the blocks in which scores are computed."""

from __future__ import annotations

import pytest
import torch

from lightning_gif.attribution import ranking
from lightning_gif.attribution.ranking import Strongest, strongest


def scores_with_ties(queries: int, examples: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(examples)
    return torch.randint(-4, 5, (queries, examples), generator=generator).double()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("block", [1, 7, 40, 2**16])
def test_strongest_is_a_stable_sort_for_any_blocks(monkeypatch: pytest.MonkeyPatch, block: int, largest: bool) -> None:
    monkeypatch.setattr(ranking, "_BLOCK", block)
    scores, indices = scores_with_ties(3, 41), torch.randperm(41) + 100
    order = scores.sort(dim=1, descending=largest, stable=True).indices
    for k in (1, 5, 41, 60):
        found = strongest(scores, indices, k, largest=largest)
        assert torch.equal(found.indices, indices[order[:, :k]])
        assert torch.equal(found.scores, scores.gather(1, order[:, :k]))


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("sizes", [[41], [1] * 41, [3, 20, 18]])
def test_blocks_of_any_size_and_order_give_the_same_ranking(sizes: list[int], backwards: bool) -> None:
    scores, indices = scores_with_ties(2, 41), torch.randperm(41) * 3
    kept, starts = Strongest(2, indices, 6), [sum(sizes[:i]) for i in range(len(sizes))]
    blocks = list(zip(starts, sizes, strict=True))
    for start, size in reversed(blocks) if backwards else blocks:
        kept.write(start, scores[:, start : start + size])
    both, ids = kept.both()
    highest, lowest = (strongest(scores, indices, 6, largest=largest) for largest in (True, False))
    assert torch.equal(ids, torch.cat([highest.indices, lowest.indices.flip(1)], 1))
    assert torch.equal(both, torch.cat([highest.scores, lowest.scores.flip(1)], 1))
    assert bool((both.diff(dim=1) <= 0).all())
