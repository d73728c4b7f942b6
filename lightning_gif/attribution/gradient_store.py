"""The store: a folder with the projected gradient of each training example, which answers queries without the data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import Settings
from ..curvature.projection import Projection
from ..data.plain import probe_from_plain, probe_to_plain
from ..data.probe import Probe
from ..errors import ConfigurationError
from ..objective.objective import Objective
from ..objective.shadow import ModelState
from ..storage.artifact import Format, read_file, write_file
from ..storage.atomic import replace_file
from ..storage.digests import differences, digest
from ..storage.schema import parse_errors_name, read, restored_fields

__all__ = ["Chunk", "GradientStore", "Manifest", "StoredState"]


# The number of coordinates that are kept of each gradient. benchmarks/README.md, "A store of gradients".
RANK = 1024

# The number of examples in a chunk: what is computed again after an interruption.
CHUNK = 4096

_LARGEST = 127  # of a coordinate as an int8

_MANIFEST, _EXAMPLES = "manifest.json", "examples.safetensors"
_STATE, _CHUNK = "state-{}.safetensors", "chunk-{:06}.safetensors"

# How the names of files begin that are being written.
_UNFINISHED = tuple(f".{name.partition('{')[0]}" for name in (_MANIFEST, _EXAMPLES, _STATE, _CHUNK))

_NAME, _VERSION = "lightning-gif gradient store", 1

_REMEDY = (
    "Call trainer.store_gradients again with the same weights, data and arguments: it computes what is damaged or"
    " missing."
)

_PART = Format(_NAME, versions=(_VERSION,), what="a part of a store of gradients", remedy=_REMEDY)


@dataclass(frozen=True)
class Manifest:
    """What a store holds, as plain values.

    Attributes:
        n_train: The number of training examples.
        n_stored: The number of those whose gradients are stored.
        dataset_size: The number of items of the training dataset; ``None`` if it has no length.
        rank: The largest number of coordinates of a gradient.
        snapshots: The epochs of the snapshots.
        epoch: The number of epochs of the trainer.
        settings: The settings.
        losses: How the losses were computed.
        class_names: The names of the classes, if they were known.
        fingerprint: Digests and values of everything that the gradients depend on.
        chunk: The number of examples in a chunk.
    """

    n_train: int
    n_stored: int
    dataset_size: int | None
    rank: int
    snapshots: list[int]
    epoch: int
    settings: dict[str, Any]
    losses: str
    class_names: list[str] | None
    fingerprint: dict[str, str]
    chunk: int = field(default_factory=lambda: CHUNK)

    @property
    def n_states(self) -> int:
        """The number of states of the model: the present one, and the snapshots."""
        return 1 + len(self.snapshots)

    @property
    def n_chunks(self) -> int:
        return -(-self.n_stored // self.chunk)

    @property
    def mark(self) -> str:
        """A digest that all parts of the store have."""
        return digest({}, asdict(self))


class StoredState(NamedTuple):
    """What a store knows about a state of the model.

    Attributes:
        projection: The projection of its gradients.
        state: Its parameters and buffers; ``None`` for the present ones, which are those of the module.
        decay: ``(G + D)⁻¹θ``, ``(p,)``, with which the gradient of weight decay enters scores; ``None`` without decay.
        facts: Plain values: the damping, how the curvature was computed, and the correlation with full scores.
    """

    projection: Projection
    state: ModelState | None
    decay: Tensor | None
    facts: dict[str, Any]


class Chunk(NamedTuple):
    """The gradients of consecutive examples of a store.

    Attributes:
        start: The position of the first one.
        values: Their coordinates at each state, ``(S, b, r)``.
        labels: Their labels ``(b,)``; ``None`` if the targets are not labels.
    """

    start: int
    values: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class GradientStore:
    """A store of gradients: with it, ``trainer.influence(batch, store=folder)`` needs no training data.

    ``trainer.store_gradients`` writes it. Coordinates are stored as whole numbers from -127 to 127, with a factor for
    each example. The examples are in chunks of 4096, each in a file with a checksum. A file is in its place only when
    it is complete, so a call that was interrupted goes on after the last complete chunk.

    Attributes:
        folder: The folder.
        manifest: What the store holds.
    """

    folder: Path
    manifest: Manifest

    # ----------------------------------------------------------------------------------------------------------------
    # Opening
    # ----------------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> GradientStore:
        """A new store, or the store of the same gradients that an earlier call has begun in the folder.

        Raises:
            ConfigurationError: If the folder holds anything else.
        """
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(f"{str(folder)!r} is a file. A store is a folder; give another path.")
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.*"):  # files that an interrupted call has not completed
            if left.name.startswith(_UNFINISHED):
                left.unlink()
        if not any(folder.iterdir()):
            record = {"format": f"{_NAME} {_VERSION}", "digest": digest({}, asdict(manifest)), **asdict(manifest)}
            replace_file(folder / _MANIFEST, json.dumps(record, indent=1).encode())
        store = cls._read(folder)
        stored, expected = asdict(store.manifest), asdict(manifest)
        other = differences(stored.pop("fingerprint"), expected.pop("fingerprint"))
        other = other or differences(stored, {name: expected[name] for name in ("rank", "snapshots", "n_stored")})
        if other:
            raise ConfigurationError(
                f"{str(folder)!r} holds a store of other gradients, which differ in: {other}. Give another folder, or"
                " delete this one."
            )
        return store

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> GradientStore:
        """The store in a folder.

        Raises:
            ConfigurationError: If there is none, it is not finished, its manifest is damaged, or it is of another
                version.
        """
        path = Path(folder)
        if not path.is_dir():
            raise ConfigurationError(
                f"There is no store at {os.fspath(folder)!r}. Write one, or give the folder of an earlier call of"
                " trainer.store_gradients."
            )
        store = cls._read(path)
        if missing := store.missing:
            done = store.manifest.n_stored - sum(store.size_of(number) for number in missing)
            raise ConfigurationError(
                f"The store at {os.fspath(folder)!r} is not finished: it has {done} of {store.manifest.n_stored}"
                f" examples. {_REMEDY}"
            )
        return store

    @classmethod
    def _read(cls, folder: Path) -> GradientStore:
        path = folder / _MANIFEST
        if not path.is_file():
            raise ConfigurationError(
                f"{str(folder)!r} holds no store of gradients: it has no {_MANIFEST}. Give the folder of"
                " trainer.store_gradients, or an empty one to write a store."
            )
        remedy = "Copy the folder again from where it was written, or delete it and write the store again."
        with parse_errors_name(path, remedy):
            record = read(path)
            stated, expected = record.pop("format"), record.pop("digest")
            if stated != f"{_NAME} {_VERSION}":
                raise ConfigurationError(
                    f"{str(path)!r} states the format {stated!r:.80}, expected '{_NAME} {_VERSION}'. Use the version of"
                    " this package that wrote it, or write the store again into another folder."
                )
            manifest = Manifest(**restored_fields(Manifest, record))
            if digest({}, asdict(manifest)) != expected:
                raise ValueError("it was edited or damaged: its contents do not have the SHA-256 that it states")
        return cls(folder, manifest)

    # ----------------------------------------------------------------------------------------------------------------
    # What there is
    # ----------------------------------------------------------------------------------------------------------------

    def size_of(self, number: int) -> int:
        """The number of examples in a chunk."""
        return min(self.manifest.chunk, self.manifest.n_stored - number * self.manifest.chunk)

    def positions_of(self, number: int) -> Tensor:
        """The positions of the examples of a chunk in the store, ``(b,)``."""
        start = number * self.manifest.chunk
        return torch.arange(start, start + self.size_of(number))

    @property
    def missing(self) -> list[int]:
        """The numbers of the chunks that are not written yet; all of them if the other files are not complete."""
        manifest = self.manifest
        whole = self.has_examples and all(map(self.has_state, range(manifest.n_states)))
        return [n for n in range(manifest.n_chunks) if not whole or not self._chunk(n).is_file()]

    @property
    def has_examples(self) -> bool:
        """Whether the file of the examples is there."""
        return (self.folder / _EXAMPLES).is_file()

    def has_state(self, number: int) -> bool:
        """Whether the file of a state is there."""
        return (self.folder / _STATE.format(number)).is_file()

    def drop_damaged(self) -> int:
        """Deletes the files that are damaged, so that they are missing. Returns their number."""
        names = [_EXAMPLES, *(_STATE.format(number) for number in range(self.manifest.n_states))]
        damaged = 0
        for path in [self.folder / name for name in names] + [self._chunk(n) for n in range(self.manifest.n_chunks)]:
            if path.exists():
                try:
                    self._part(path)
                except ConfigurationError:
                    path.unlink()
                    damaged += 1
        return damaged

    @property
    def nbytes(self) -> int:
        """The bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    @property
    def settings(self) -> Settings:
        """The settings with which the store was written."""
        with parse_errors_name(self.folder / _MANIFEST, _REMEDY):
            return Settings(**self.manifest.settings)

    @cached_property
    def ids(self) -> Tensor:
        """The dataset index of each example, ``(n,)``."""
        return self._examples[1]["ids"]

    def probe(self, device: torch.device) -> Probe:
        """A few training examples, from which an objective learns how losses are computed."""
        record, tensors = self._examples
        with parse_errors_name(self.folder / _EXAMPLES, _REMEDY):
            return probe_from_plain(record, tensors, device)

    @cached_property
    def _examples(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        record, tensors = self._part(self.folder / _EXAMPLES)
        with parse_errors_name(self.folder / _EXAMPLES, _REMEDY):
            if tensors["ids"].shape != (self.manifest.n_stored,) or tensors["ids"].dtype != torch.int64:
                raise ValueError("its ids are not one whole number for each example")
        return record, tensors

    def _chunk(self, number: int) -> Path:
        return self.folder / _CHUNK.format(number)

    def _part(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The record and the tensors of a file of this store.

        Raises:
            ConfigurationError: If the file is missing, damaged, or of another store or version.
        """
        if not path.is_file():
            raise ConfigurationError(f"The store lacks {str(path)!r}. {_REMEDY}")
        _, record, tensors = read_file(path, _PART)
        with parse_errors_name(path, _REMEDY):
            mark = record.pop("store")
        if mark != self.manifest.mark:
            raise ConfigurationError(f"{str(path)!r} is a part of another store. {_REMEDY}")
        return record, tensors

    def _write(self, path: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        write_file(path, _PART, {**record, "store": self.manifest.mark}, tensors)

    # ----------------------------------------------------------------------------------------------------------------
    # Parts
    # ----------------------------------------------------------------------------------------------------------------

    def write_examples(self, ids: Tensor, probe: Probe) -> None:
        """Writes the dataset indices ``(n,)``, and a few training examples.

        Raises:
            BatchError: If these cannot be written.
        """
        record, tensors = probe_to_plain(probe)
        self._write(self.folder / _EXAMPLES, record, {"ids": ids, **tensors})

    def write_state(self, number: int, stored: StoredState) -> None:
        """Writes what is known about a state of the model."""
        record, tensors = stored.projection.to_record()
        written = {f"projection/{name}": tensor for name, tensor in tensors.items()}
        if stored.decay is not None:
            written["decay"] = stored.decay
        if stored.state is not None:
            written["theta"] = stored.state.theta
            written |= {f"buffers/{name}": value for name, value in stored.state.statistics.items()}
        self._write(self.folder / _STATE.format(number), {"projection": record, "facts": stored.facts}, written)

    def read_state(self, number: int, objective: Objective) -> StoredState:
        """What :meth:`write_state` wrote.

        Args:
            number: The number of the state; 0 for the present weights.
            objective: The open objective of the module with these weights.

        Raises:
            ConfigurationError: If the file is missing, damaged or of another store, or if the module has other layers.
        """
        path = self.folder / _STATE.format(number)
        record, tensors = self._part(path)

        def beginning(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}

        with parse_errors_name(path, _REMEDY):
            projection = Projection.from_record(objective, record["projection"], beginning("projection/"))
            theta, state = objective.theta, None
            if number:
                buffers = {name: one.to(theta.device) for name, one in beginning("buffers/").items()}
                state = ModelState(tensors["theta"].to(theta), buffers)
            decay = tensors["decay"].to(theta) if "decay" in tensors else None
            return StoredState(projection, state, decay, dict(record["facts"]))

    def write_chunk(self, number: int, values: Tensor, labels: Tensor | None) -> None:
        """Writes the coordinates ``(S, b, r)`` and the labels ``(b,)`` of the examples of a chunk."""
        factors, whole = quantised(values)
        tensors = {"values": whole, "factors": factors, **({} if labels is None else {"labels": labels})}
        self._write(self._chunk(number), {"number": number}, tensors)

    def read_chunk(self, number: int) -> Chunk:
        """What :meth:`write_chunk` wrote, with rounded coordinates in float32.

        Raises:
            ConfigurationError: If the file is missing, damaged, or of another store or version.
        """
        path = self._chunk(number)
        record, tensors = self._part(path)
        with parse_errors_name(path, _REMEDY):
            values, factors, labels = tensors["values"], tensors["factors"], tensors.get("labels")
            size = self.size_of(number)
            fits = values.ndim == 3 and values.shape[:2] == (self.manifest.n_states, size) == factors.shape
            if record["number"] != number or not fits or (labels is not None and labels.shape != (size,)):
                raise ValueError("it does not have the examples of this chunk")
        return Chunk(number * self.manifest.chunk, values.float() * factors[..., None], labels)

    def chunks(self, numbers: list[int] | range) -> Iterator[Chunk]:
        """Reads chunks, one after the other."""
        return map(self.read_chunk, numbers)

    def __str__(self) -> str:
        manifest = self.manifest
        states = f"{manifest.n_states} state{'s' * (manifest.n_states > 1)} of the model"
        lines = [
            f"Store of the gradients of {manifest.n_stored} training examples at {str(self.folder)!r}",
            f"  {self.nbytes / 2**20:.1f} MiB, {states}, at most {manifest.rank} coordinates for each gradient",
        ]
        for number in range(manifest.n_states):
            facts = self._part(self.folder / _STATE.format(number))[0]["facts"]
            if facts.get("correlation") is not None:
                lines.append(
                    f"  state {number}: correlation with full scores {facts['correlation']:.3f}, on examples that the"
                    " projection was not fitted to"
                )
        return "\n".join(lines)


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``(…,)`` and whole numbers ``(…, r)`` in int8. Their products are values ``(…, r)`` up to rounding."""
    factors = values.float().abs().amax(-1) / _LARGEST
    divisors = torch.where(factors > 0, factors, 1)
    return factors, (values / divisors[..., None]).round().to(torch.int8)
