"""Writes a store of gradients, in one pass over the training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from .._compat import rank_zero_warn
from ..config import Settings
from ..curvature.ekfac import EKFACInverse, require_layers
from ..curvature.methods import METHODS
from ..curvature.projection import Projection
from ..curvature.sampling import kept_sample
from ..data.batch import Batch
from ..data.examples import Examples
from ..data.identity import data_digest
from ..distributed import SINGLE_PROCESS
from ..errors import ConfigurationError, GIFWarning
from ..objective.objective import Objective
from ..objective.shadow import ModelState
from ..parameters import weights_digest
from ..storage.digests import Fingerprint, digest
from .gradient_store import GradientStore, Manifest, StoredState, quantised
from .influence import require_finite_scores

__all__ = ["store_gradients", "weights_mark"]


# The numbers of examples whose scores are compared with full ones: queries, and examples that are scored for them.
_ASKED, _COMPARED = 16, 256

# Settings on which the gradients do not depend, because EK-FAC does not iterate.
_IRRELEVANT = {"selector", "ratio", "max_iter", "rtol", "discrepancy", "eigenvalues", "batch_size"}


def store_gradients(
    objective: Objective,
    train: Examples,
    settings: Settings,
    folder: Path,
    *,
    rank: int,
    among: Examples | None = None,
    states: Mapping[int, Mapping[str, Tensor]] | None = None,
    epoch: int = 0,
    class_names: Sequence[str] | None = None,
) -> GradientStore:
    """Writes the projected gradient of each training example into a folder.

    The curvature is EK-FAC, see :class:`~lightning_gif.curvature.ekfac.EKFACInverse`. A gradient is projected by
    :class:`~lightning_gif.curvature.projection.Projection`. Each process writes its share of the chunks. If the call is
    interrupted, the same call goes on after the last complete chunks.

    Args:
        objective: An open objective.
        train: The training examples.
        settings: Curvature, damping and their parameters.
        folder: The folder, which all processes must see.
        rank: The largest number of coordinates of a gradient.
        among: The training examples to store; by default all.
        states: Snapshots by epoch, over which scores will be averaged.
        epoch: The number of epochs of the trainer.
        class_names: The names of the classes, for reports.

    Raises:
        ConfigurationError: If the module does not use all its parameters in layers; or if the folder holds anything
            else than a store of these gradients.
        BatchError: If a batch has values that cannot be written.
        NonFiniteError: If a gradient is not finite.
    """
    require_layers(objective, settings, METHODS[settings.method])
    scored, processes = train if among is None else among, objective.processes
    model_states = [objective.model_state(), *map(objective.model_state, (states or {}).values())]
    mark = {
        **weights_mark(objective),
        "snapshots": digest({}, [digest({"theta": one.theta, **one.statistics}) for one in model_states[1:]]),
        "training data": data_digest(train),
        "the examples that are stored": digest({"ids": scored.ids}),
        **{name: value for name, value in settings.fingerprint().items() if name not in _IRRELEVANT},
    }
    manifest = Manifest(
        n_train=len(train),
        n_stored=len(scored),
        dataset_size=len(train.dataset) if hasattr(train.dataset, "__len__") else None,
        rank=rank,
        snapshots=list(states or {}),
        epoch=epoch,
        settings=asdict(settings),
        losses=objective.loss.origin,
        class_names=None if class_names is None else list(class_names),
        fingerprint=processes.broadcast(mark),
    )
    store = _begun(objective, folder, manifest, scored)
    projections = [
        _projection_at(objective, train, settings, store, number, state) for number, state in enumerate(model_states)
    ]
    _write_chunks(objective, scored, store, list(zip(model_states, projections, strict=True)))
    processes.gather(None)  # until all have written their chunks
    return GradientStore.open(folder)


def weights_mark(objective: Objective) -> Fingerprint:
    """The digest of the weights of the module, those of the first process."""
    return {"weights": objective.processes.broadcast(weights_digest(objective.module))}


def _begun(objective: Objective, folder: Path, manifest: Manifest, scored: Examples) -> GradientStore:
    """The store, a new one or that of an interrupted call. The first process creates it."""
    processes = objective.processes
    given = [str(folder), manifest.rank, manifest.snapshots]
    processes.assert_equal(given, "folder, rank and snapshots", "Make the same call on all of them.")
    if processes.rank == 0:
        store = GradientStore.create(folder, manifest)
        if damaged := store.drop_damaged():
            rank_zero_warn(
                f"The store at {str(folder)!r} has damaged files: {damaged}. They are computed again.",
                category=GIFWarning,
            )
        if not store.has_examples:
            assert objective.probe is not None  # since the structure of the training examples is known
            store.write_examples(scored.ids, objective.probe)
        manifest = store.manifest  # settings that do not matter may differ
    manifest = processes.broadcast(manifest)  # the other processes wait until the store exists
    if not folder.is_dir():
        raise ConfigurationError(
            f"Rank {processes.rank} does not see the folder {str(folder)!r}, which rank 0 has created for the store."
            " Give a folder that all processes see, on a file system that the machines share."
        )
    return GradientStore(folder, manifest)


def _projection_at(
    objective: Objective, train: Examples, settings: Settings, store: GradientStore, number: int, state: ModelState
) -> Projection:
    """The projection at a state of the model: that of the store, or else a new one, which is stored."""
    processes = objective.processes
    if processes.broadcast(not store.has_state(number)):
        with objective.at_state(state):
            stored = _fitted(objective, train, settings, store.manifest.rank)
        if processes.rank == 0:
            store.write_state(number, stored if number == 0 else stored._replace(state=state))
        processes.gather(None)  # the other processes wait until the file exists
    return store.read_state(number, objective).projection


def _fitted(objective: Objective, train: Examples, settings: Settings, rank: int) -> StoredState:
    """The projection at the objective's present state, and what else a query needs."""
    layers = objective.layers
    assert layers is not None  # was checked before
    sample = kept_sample(objective, train, settings)
    with objective.progress.stage("Curvature") as update:
        ekfac = EKFACInverse.of(objective, layers, sample, settings, update)
    projection = Projection.fit(objective, ekfac, sample, rank)
    decay = ekfac.ihvp(objective.theta[None])[0][0] if settings.weight_decay else None
    facts = {
        "damping": ekfac.damping,
        "curvature": {**ekfac.summary(), "coordinates": projection.rank},
        "correlation": _correlation(objective, train, sample, ekfac, projection, settings.seed),
    }
    return StoredState(projection, None, decay, facts)


def _correlation(
    objective: Objective, train: Examples, sample: Examples, ekfac: EKFACInverse, projection: Projection, seed: int
) -> float | None:
    """The mean correlation over queries of stored scores and full ones; ``None`` if scores do not vary.

    Queries and scored examples are training examples outside of the sample, if there are enough.
    """
    others = (~torch.isin(train.ids, sample.ids)).nonzero().squeeze(1)
    if len(others) < 2 * _ASKED:
        others = torch.arange(len(train))
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: _ASKED + _COMPARED]]
    few = [
        replace(train.subset(part.sort().values), processes=SINGLE_PROCESS) for part in (drawn[:_ASKED], drawn[_ASKED:])
    ]
    if not all(map(len, few)):
        return None
    asked, scored = (list(one.batches()) for one in few)
    queries = torch.cat([rows for batch in asked for rows in objective.gradients(batch)])
    ihvps, layers = ekfac.ihvp(queries)[0], objective.layers
    assert layers is not None
    full = torch.cat([layers.products(batch, ihvps) for batch in scored], 1).detach().cpu().double()
    factors, whole = quantised(torch.cat([projection.of_losses(objective, batch) for batch in scored]))
    stored = (projection.of_gradients(queries) @ (whole.to(factors) * factors[:, None]).to(queries).T).cpu().double()
    full, stored = (one - one.mean(1, keepdim=True) for one in (full, stored))
    lengths = full.norm(dim=1) * stored.norm(dim=1)
    found = (full * stored).sum(1)[lengths > 0] / lengths[lengths > 0]
    return float(found.mean()) if len(found) else None


# ----------------------------------------------------------------------------------------------------------------------
# The pass over the training examples
# ----------------------------------------------------------------------------------------------------------------------


def _write_chunks(
    objective: Objective, scored: Examples, store: GradientStore, states: list[tuple[ModelState, Projection]]
) -> None:
    """Writes this process's share of the missing chunks."""
    processes = objective.processes
    missing = processes.broadcast(store.missing)
    mine = missing[processes.rank :: processes.size]
    if not mine:
        return
    examples = replace(scored.subset(torch.cat([store.positions_of(n) for n in mine])), processes=SINGLE_PROCESS)
    sizes, waiting = iter([(number, store.size_of(number)) for number in mine]), _Rows()
    number, size = next(sizes)
    with objective.progress.stage("Storing gradients", len(examples)) as update:
        # Batches of other examples could round differently, and a chunk that is written again should be the same.
        for batch in examples.batches(within=store.manifest.chunk):
            waiting.add(_coordinates(objective, batch, states), batch)
            while number >= 0 and waiting.count >= size:
                store.write_chunk(number, *waiting.take(size))
                number, size = next(sizes, (-1, 0))
            update(batch.size)


def _coordinates(objective: Objective, batch: Batch, states: list[tuple[ModelState, Projection]]) -> Tensor:
    """The coordinates ``(S, b, r)`` of the gradients of a batch at all states; of fewer, the last ones are 0."""
    found = list[Tensor]()
    for state, projection in states:
        with objective.at_state(state):
            found.append(projection.of_losses(objective, batch).cpu())
        require_finite_scores(found[-1].T, batch.ids)
    rank = max(one.shape[1] for one in found)
    return torch.stack([torch.nn.functional.pad(one, (0, rank - one.shape[1])) for one in found])


class _Rows:
    """Coordinates and labels of examples that wait for their chunk to be complete."""

    def __init__(self) -> None:
        self._values, self._labels = list[Tensor](), list[Tensor | None]()

    @property
    def count(self) -> int:
        """The number of waiting examples."""
        return sum(one.shape[1] for one in self._values)

    def add(self, values: Tensor, batch: Batch) -> None:
        """Adds the coordinates ``(S, b, r)`` of a batch."""
        self._values.append(values)
        self._labels.append(None if batch.classes is None else batch.classes.cpu())

    def take(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Removes the first ``size`` examples: their coordinates ``(S, size, r)`` and labels ``(size,)``."""
        values, known = torch.cat(self._values, 1), [one for one in self._labels if one is not None]
        labels = torch.cat(known) if len(known) == len(self._labels) else None
        self._values = [values[:, size:]]
        self._labels = [None if labels is None else labels[size:]]
        return values[:, :size], None if labels is None else labels[:size]
