"""A projection of gradients to a few coordinates that keeps their inner products with the inverse curvature.

The inverse of EK-FAC is ``RᵀR``, where ``R`` rotates a gradient into the Kronecker basis and divides it by the roots of
the damped eigenvalues. So ``qᵀ(G + D)⁻¹g`` is the inner product of ``Rq`` and ``Rg``. Of the entries of ``Rg``, those
with the largest ``λ/(λ + d)`` are kept first: gradients have little in the others. Then principal components of the
training examples keep most of what is left in a few coordinates. LoGra (Choe et al., arXiv 2405.13954) projects
each side of a layer instead, before it inverts the curvature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from ..data.batch import Batch
from ..data.examples import Examples
from ..errors import ConfigurationError
from ..objective.layer_gradients import RecordedPass
from ..objective.layers import Part
from ..objective.objective import Objective
from ..parameters import ParameterSpace
from .ekfac import EKFACInverse, KroneckerBlock, kronecker_blocks, rotated_gradients

__all__ = ["Projection"]

# The most entries in the Kronecker basis that are kept before the principal components are taken.
# benchmarks/README.md, "A store of gradients".
ENTRIES = 8192

# A principal component whose variance is smaller than this share of the largest one is rounding.
_ROUNDING = 1e-10


class BlockEntries(NamedTuple):
    """The entries of a block's matrix in the Kronecker basis that are kept.

    Attributes:
        block: The block with the eigenvectors that these entries need.
        positions: The positions ``(m,)`` of the entries in the flat matrix in these eigenvectors.
        factors: The root of the inverse of the damped eigenvalue of each entry, ``(m,)``.
    """

    block: KroneckerBlock
    positions: Tensor
    factors: Tensor

    @classmethod
    def of(cls, block: KroneckerBlock, divisors: Tensor, chosen: Tensor) -> BlockEntries:
        """The entries at positions ``chosen`` ``(m,)`` of the flat matrix with damped eigenvalues ``(o, i)``."""
        width = divisors.shape[1]
        rows, columns = chosen // width, chosen % width
        outer, inner = block.outer, block.inner
        if outer is not None:
            needed, rows = rows.unique(return_inverse=True)
            outer = outer[:, needed].contiguous()
        if inner is not None:
            needed, columns = columns.unique(return_inverse=True)
            inner, width = inner[:, needed].contiguous(), len(needed)
        kept = replace(block, outer=outer, inner=inner, values=divisors.new_empty(0))
        return cls(kept, rows * width + columns, divisors.flatten()[chosen].rsqrt())

    def of_matrices(self, matrices: Tensor) -> Tensor:
        """The kept entries ``(b, m)`` of matrices ``(b, o, i)`` in the Kronecker basis."""
        return matrices.flatten(1)[:, self.positions] * self.factors


class OtherEntries(NamedTuple):
    """The kept entries of a parameter that is in no block.

    Attributes:
        name: The name of the parameter.
        size: The number of all its entries.
        positions: The positions ``(m,)`` of those that are kept.
        factors: The root of the inverse of the damped diagonal entry of each, ``(m,)``.
    """

    name: str
    size: int
    positions: Tensor
    factors: Tensor


@dataclass
class Projection:
    """The projection of gradients ``(p,)`` to coordinates ``(r,)``.

    Attributes:
        space: The parameters.
        blocks: The kept entries of the blocks.
        others: Those of other parameters.
        components: The principal components ``(k, r)`` of the ``k`` kept entries; ``None`` if all entries are
            coordinates.
    """

    space: ParameterSpace
    blocks: list[BlockEntries]
    others: list[OtherEntries]
    components: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of coordinates, ``r``."""
        return self._n_entries if self.components is None else self.components.shape[1]

    @property
    def _n_entries(self) -> int:
        return sum(len(one.positions) for one in self.blocks) + sum(len(one.positions) for one in self.others)

    @classmethod
    def fit(cls, objective: Objective, ekfac: EKFACInverse, sample: Examples, rank: int) -> Self:
        """The projection for an inverse, with the principal components of a sample of training examples.

        Each example of the sample counts with a gradient of length 1. Otherwise the few with the largest gradients
        would decide, and queries that resemble others would be answered badly.

        Args:
            objective: The open objective.
            ekfac: The inverse.
            sample: The sample; on all processes the same.
            rank: The largest number of coordinates.
        """
        found = cls._leading(ekfac, max(ENTRIES, rank), objective.space)
        if found._n_entries > rank:
            rows = [found.of_losses(objective, batch).cpu() for batch in sample.local_batches()]
            values = sample.all_gather(rows)
            lengths = values.norm(dim=1, keepdim=True)
            components = _principal(values / torch.where(lengths > 0, lengths, 1), rank)
            # Half the bytes. Both sides of each inner product are projected by the rounded components.
            found.components = objective.processes.broadcast(components.half()).to(objective.theta)
        return found

    @classmethod
    def _leading(cls, ekfac: EKFACInverse, most: int, space: ParameterSpace) -> Self:
        """The projection to the ``most`` entries with the largest ``λ/(λ + d)``."""
        values = [*(block.values for block in ekfac.blocks), *ekfac.diagonal.values()]
        divisors = [ekfac.damped(one) for one in values]
        shares = torch.cat([(one / by).flatten() for one, by in zip(values, divisors, strict=True)])
        chosen = shares.topk(min(most, len(shares))).indices.sort().values
        ends = torch.tensor([one.numel() for one in values], device=chosen.device).cumsum(0)
        owners = torch.searchsorted(ends, chosen, right=True)
        blocks, others = list[BlockEntries](), list[OtherEntries]()
        for number, (one, by) in enumerate(zip(values, divisors, strict=True)):
            positions = chosen[owners == number] - (ends[number] - one.numel())
            if not len(positions):
                continue
            if number < len(ekfac.blocks):
                blocks.append(BlockEntries.of(ekfac.blocks[number], by, positions))
            else:
                name = list(ekfac.diagonal)[number - len(ekfac.blocks)]
                others.append(OtherEntries(name, len(one), positions, by[positions].rsqrt()))
        return cls(space, blocks, others)

    # ----------------------------------------------------------------------------------------------------------------
    # Coordinates
    # ----------------------------------------------------------------------------------------------------------------

    def of_losses(self, objective: Objective, batch: Batch) -> Tensor:
        """The coordinates ``(B, r)`` of the gradient of each loss of a batch, by one backward pass.

        Args:
            objective: The open objective, whose module uses all its parameters in layers.
            batch: A batch of ``B`` examples.
        """
        layers, found = objective.layers, list[Tensor]()
        assert layers is not None
        for part in layers.parts(batch):
            recorded = layers.record_losses(part)
            if recorded is None:
                found += map(self.of_gradients, layers.without_layers(part))
            else:
                found.append(self._of_pass(recorded, recorded.output_gradients())[: part.size])
        return torch.cat(found).detach()

    def _of_pass(self, recorded: RecordedPass, deltas: Sequence[Tensor]) -> Tensor:
        entries = [
            torch.cat([one.of_matrices(part) for part in rotated_gradients(one.block, recorded, deltas, self.space)])
            for one in self.blocks
        ]
        for one in self.others:
            entries.append(recorded.of_parameter(one.name, one.size, deltas)[:, one.positions] * one.factors)
        return self._projected(entries)

    def of_gradients(self, gradients: Tensor) -> Tensor:
        """The coordinates ``(b, r)`` of gradients ``(b, p)``."""

        def values(name: str) -> Tensor:
            return self.space.of(name, gradients)

        entries = [one.of_matrices(one.block.rotate(one.block.matrix(values))) for one in self.blocks]
        entries += [values(one.name)[:, one.positions] * one.factors for one in self.others]
        return self._projected(entries)

    def _projected(self, entries: list[Tensor]) -> Tensor:
        joined = torch.cat(entries, 1)
        return joined if self.components is None else joined @ self.components

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    def to_record(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors, from which :meth:`from_record` restores the projection."""
        tensors: dict[str, Tensor] = {}
        for number, one in enumerate(self.blocks):
            parts = {"outer": one.block.outer, "inner": one.block.inner, **one._asdict()}
            tensors |= {f"block {number}/{name}": part for name, part in parts.items() if isinstance(part, Tensor)}
        for number, other in enumerate(self.others):
            tensors |= {f"other {number}/positions": other.positions, f"other {number}/factors": other.factors}
        if self.components is not None:
            tensors["components"] = self.components.half()
        record = {
            "blocks": [_signature(one.block) for one in self.blocks],
            "others": [[one.name, one.size] for one in self.others],
        }
        return record, tensors

    @classmethod
    def from_record(cls, objective: Objective, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The projection from the result of :meth:`to_record`.

        Args:
            objective: The open objective of the same module.
            record: The plain values.
            tensors: The tensors.

        Raises:
            ConfigurationError: If the module has other layers, or none.
            LookupError, TypeError, ValueError: If values are missing or do not fit together.
        """
        space, theta = objective.space, objective.theta
        uses = () if objective.layers is None else objective.layers.uses.values()
        known = {_key(_signature(block)): block for block in kronecker_blocks(uses, space)}

        def tensor(name: str, like: Callable[[Tensor], Tensor] = lambda one: one.to(theta)) -> Tensor:
            return like(tensors[name])

        def entries(number: int, kind: str) -> tuple[Tensor, Tensor]:
            return tensor(f"{kind} {number}/positions", lambda one: one.to(theta.device)), tensor(
                f"{kind} {number}/factors"
            )

        blocks = list[BlockEntries]()
        for number, signature in enumerate(record["blocks"]):
            block = known.get(_key(signature))
            if block is None:
                raise ConfigurationError(
                    f"The module has no layer with the parameter {signature[0][0]!r} as the store has it. Use the same"
                    " code of the module, or write the store again."
                )
            outer, inner = (
                tensor(f"block {number}/{side}") if f"block {number}/{side}" in tensors else None
                for side in ("outer", "inner")
            )
            blocks.append(BlockEntries(replace(block, outer=outer, inner=inner), *entries(number, "block")))
        others = [
            OtherEntries(str(name), int(size), *entries(number, "other"))
            for number, (name, size) in enumerate(record["others"])
        ]
        missing = [one.name for one in others if one.name not in space.slots]
        if missing:
            raise ConfigurationError(f"The module has no trainable parameter {missing[0]!r}, but the store has it.")
        return cls(space, blocks, others, tensor("components") if "components" in tensors else None)


def _principal(rows: Tensor, rank: int) -> Tensor:
    """The ``rank`` leading right singular vectors ``(k, r)`` of rows ``(m, k)``; fewer if there are fewer."""
    values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    leading = values.argsort(descending=True)[:rank]
    leading = leading[values[leading] > _ROUNDING * max(float(values[-1]), math.ulp(0.0))]
    return rows.T @ (vectors[:, leading] / values[leading].sqrt()).to(rows)


def _signature(block: KroneckerBlock) -> list[Any]:
    """The parts of a block as plain values: equal for the same views of the same parameters."""

    def of_part(part: Part | None) -> list[Any] | None:
        return None if part is None else list(part.signature)

    return [of_part(block.weight), of_part(block.bias), block.is_table]


def _key(signature: list[Any]) -> str:
    return str(signature)
