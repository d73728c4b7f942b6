"""The folder with the record of a training run: its states at some optimizer steps, and what each step did."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..storage.artifact import Format, read_file, write_file
from ..storage.atomic import replace_file
from ..storage.schema import parse_errors_name, read, restored_fields

__all__ = ["BatchRecord", "Run", "StepRecord", "TrainingState", "Trajectory"]


_MANIFEST = "run.json"

_FORMAT = "lightning-gif trajectory 1"

_REMEDY = "Copy the folder again from where it was recorded, or train again with another folder as `trajectory`."

_STATE = Format("lightning-gif training state", (1,), "a state of a recorded training run", _REMEDY)

_STEPS = Format("lightning-gif training steps", (1,), "steps of a recorded training run", _REMEDY)

_AVERAGE = "average.safetensors"

_AVERAGES = "averages.safetensors"

# The plain values of a step.
_OF_STEP = ("epoch", "divisor", "members", "options", "evaluating")

# The states of random generators of a batch.
_GENERATORS = ("generators", "reading")

_STATE_NAME = re.compile(r"state-(\d+)\.safetensors")

_STEPS_NAME = re.compile(r"steps-(\d+)-(\d+)(?:-process-(\d+))?\.safetensors")


@dataclass(frozen=True)
class BatchRecord:
    """A batch of an optimizer step.

    Attributes:
        ids: The dataset indices ``(B,)`` of its examples.
        index: The number of the batch in its epoch.
        mark: A checksum of some of its values, see :func:`~lightning_gif.trajectory.marks.mark_of`.
        generators: The states of the random generators before the batch, if it drew random numbers; else empty.
        rank: The process that it was a batch of.
        reading: The states of the random generators before its items were read, if that may have drawn random numbers;
            else empty.
    """

    ids: Tensor
    index: int
    mark: int
    generators: dict[str, Tensor]
    rank: int = 0
    reading: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """An optimizer step.

    Attributes:
        number: How many steps there were before.
        epoch: The epoch.
        divisor: By what the loss of each batch is divided: ``accumulate_grad_batches``, times the number of processes.
        members: The names of the parameters of each group of the optimizer.
        options: The settings of each group.
        evaluating: The names of the submodules in evaluation mode.
        batches: The batches whose gradients are added up. With several processes, those of the first process come
            last among the batches that are computed at the same time, since its buffers are those that go on.
    """

    number: int
    epoch: int
    divisor: int
    members: list[list[str]]
    options: list[dict[str, Any]]
    evaluating: list[str]
    batches: tuple[BatchRecord, ...]


@dataclass(frozen=True)
class TrainingState:
    """The state of a training before an optimizer step.

    Attributes:
        step: The number of the step.
        weights: The trainable parameters by name.
        others: Buffers and frozen parameters by name.
        optimizer: The optimizer's state of each parameter, by name and then by its name in PyTorch.
    """

    step: int
    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        held = [*self.weights.values(), *self.others.values()]
        held += [value for state in self.optimizer.values() for value in state.values()]
        return sum(value.numel() * value.element_size() for value in held)


@dataclass(frozen=True)
class Run:
    """What holds for a run as a whole.

    Attributes:
        mark: Tells this run from others.
        module: The class of the module.
        shapes: The shape of each trainable parameter by name.
        optimizer: The class of the optimizer.
        clip_algorithm: How gradients are clipped; ``None`` if they are not.
        clip_limit: The limit of the clipping.
        dataset_size: The number of items of the training dataset.
        n_processes: The number of processes.
        dtype: The default dtype of PyTorch.
        end: The number of steps of the run; ``None`` as long as it has not come to its end.
    """

    mark: str
    module: str
    shapes: dict[str, list[int]]
    optimizer: str
    clip_algorithm: str | None
    clip_limit: float
    dataset_size: int
    n_processes: int
    dtype: str
    end: int | None


class Trajectory:
    """The record of a run in a folder.

    Files are written completely or not at all. The manifest is written first, and states its end last. Each process
    writes the steps of its own batches, and the first one everything else.

    Args:
        folder: The folder.
        run: What holds for the run as a whole.
        rank: The process that writes.
    """

    def __init__(self, folder: Path, run: Run, rank: int = 0) -> None:
        self.folder = folder
        self.run = run
        self.rank = rank
        self._last: dict[int, tuple[tuple[int, int], list[StepRecord]]] = {}

    @classmethod
    def create(cls, folder: Path, **facts: Any) -> Trajectory:
        """Begins a record in a new folder. ``facts`` are fields of :class:`Run`."""
        folder.mkdir(parents=True, exist_ok=True)
        made = cls(folder, Run(mark=uuid.uuid4().hex, end=None, **facts))
        made._write_manifest()
        return made

    @classmethod
    def open(cls, folder: Path, rank: int = 0) -> Trajectory:
        """Opens the record that a fit has left; ``rank`` is the process that will write to it.

        Raises:
            ConfigurationError: If there is no folder, it holds no record, or the record is damaged.
        """
        path = folder / _MANIFEST
        if not path.is_file():
            what = "does not exist" if not folder.exists() else f"has no {_MANIFEST}"
            raise ConfigurationError(
                f"{str(folder)!r} is not the record of a training run: it {what}. Fit with"
                f" GIFCallback(trajectory={str(folder)!r}), or give the folder of such a fit."
            )
        with parse_errors_name(path, _REMEDY):
            values = dict(read(path))
            stated = values.pop("format", None)
            run = Run(**restored_fields(Run, values)) if stated == _FORMAT else None
        if run is None:
            raise ConfigurationError(
                f"{str(path)!r} states the format {stated!r}, expected {_FORMAT!r}: it is of another program or another"
                f" version of this package. {_REMEDY}"
            )
        return cls(folder, run, rank)

    def _write_manifest(self) -> None:
        text = json.dumps({"format": _FORMAT, **asdict(self.run)}, indent=1)
        replace_file(self.folder / _MANIFEST, text.encode())

    def set_end(self, end: int | None) -> None:
        """Notes the number of steps of the run, or that it goes on."""
        if end != self.run.end and self.rank == 0:
            self.run = replace(self.run, end=end)
            self._write_manifest()

    # ----------------------------------------------------------------------------------------------------------------
    # Files
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def states(self) -> list[int]:
        """The steps before which there is a state, in order."""
        return sorted(int(match[1]) for match in self._matches(_STATE_NAME))

    def _chunks(self, rank: int) -> list[tuple[int, int]]:
        """The first step of each file of steps of a process, and the one after its last, in order."""
        return sorted((int(one[1]), int(one[2])) for one in self._matches(_STEPS_NAME) if int(one[3] or 0) == rank)

    def _matches(self, pattern: re.Pattern[str]) -> list[re.Match[str]]:
        return [match for path in self.folder.iterdir() if (match := pattern.fullmatch(path.name))]

    def _state_path(self, step: int) -> Path:
        return self.folder / f"state-{step:08d}.safetensors"

    def _steps_path(self, first: int, stop: int, rank: int) -> Path:
        process = f"-process-{rank}" if rank else ""
        return self.folder / f"steps-{first:08d}-{stop:08d}{process}.safetensors"

    def check_whole(self) -> None:
        """Checks that the record has all steps of a run that has ended, and states at its beginning and its end.

        Raises:
            ConfigurationError: If something is missing.
        """
        name, end, states = f"The record of the training in {str(self.folder)!r}", self.run.end, self.states
        if end is None:
            reached = max([*states, *(stop for _, stop in self._chunks(0))], default=0)
            raise ConfigurationError(
                f"{name} ends at step {reached}, before the end of the run: the fit was interrupted, or its recording"
                " stopped with a warning. Finish the fit from a checkpoint (trainer.fit(model, ckpt_path=…)), or use"
                " the default influence, without `through`."
            )
        missing = [f"the state before step {step}" for step in (0, end) if step not in states]
        for rank in range(self.run.n_processes):
            at = 0
            for first, stop in self._chunks(rank):
                if first == at:
                    at = stop
            if at != end:
                missing.append(f"the steps from {at} on" + (f" of process {rank}" if self.run.n_processes > 1 else ""))
        if missing:
            stopped = (
                " Or the recording of this process has stopped with a warning." if self.run.n_processes > 1 else ""
            )
            raise ConfigurationError(f"{name} is incomplete: files with {missing[0]} are missing. {_REMEDY}{stopped}")

    # ----------------------------------------------------------------------------------------------------------------
    # States
    # ----------------------------------------------------------------------------------------------------------------

    def add_state(self, state: TrainingState) -> None:
        """Writes a state."""
        self._write_state(self._state_path(state.step), state)

    def add_average(self, state: TrainingState) -> None:
        """Writes the averaged weights and buffers at the end of the run."""
        self._write_state(self.folder / _AVERAGE, state)

    def set_averages(self, averages: Sequence[tuple[int, float, float]]) -> None:
        """Writes how the run has averaged its weights.

        Args:
            averages: For each average, the number of steps before it, the share by which it moved to the weights, and
                that by which its buffers moved to those of the module.
        """
        values = torch.tensor(averages, dtype=torch.float64).reshape(-1, 3)
        write_file(self.folder / _AVERAGES, _STEPS, {"run": self.run.mark}, {"averages": values})

    def averages(self) -> list[tuple[int, float, float]]:
        """Reads what :meth:`set_averages` wrote; empty if nothing was averaged.

        Raises:
            ConfigurationError: If the file is damaged, or is of another run.
        """
        path = self.folder / _AVERAGES
        if not path.exists():
            return []
        _, tensors = self._read(path, _STEPS)
        with parse_errors_name(path, _REMEDY):
            return [(int(steps), share, of_buffers) for steps, share, of_buffers in tensors["averages"].tolist()]

    def _write_state(self, path: Path, state: TrainingState) -> None:
        tensors = {f"weights/{name}": value for name, value in state.weights.items()}
        tensors |= {f"others/{name}": value for name, value in state.others.items()}
        tensors |= {f"optimizer/{name}/{key}": one for name, of in state.optimizer.items() for key, one in of.items()}
        write_file(path, _STATE, {"run": self.run.mark, "step": state.step}, tensors)

    def state(self, step: int) -> TrainingState:
        """Reads the state before a step.

        Raises:
            ConfigurationError: If its file is damaged, or is of another run.
        """
        return self._read_state(self._state_path(step), step)

    def average(self) -> TrainingState | None:
        """Reads the averaged weights and buffers at the end of the run; ``None`` if it had no average.

        Raises:
            ConfigurationError: If their file is damaged, or is of another run.
        """
        path = self.folder / _AVERAGE
        return self._read_state(path, self.run.end) if path.exists() else None

    def _read_state(self, path: Path, step: int | None) -> TrainingState:
        record, tensors = self._read(path, _STATE)
        found = TrainingState(record["step"], {}, {}, {})
        with parse_errors_name(path, _REMEDY):
            if record["step"] != step:
                raise ValueError(f"it is the state before step {record['step']}")
            for name, value in tensors.items():
                kind, _, rest = name.partition("/")
                if kind == "optimizer":
                    parameter, _, key = rest.rpartition("/")
                    found.optimizer.setdefault(parameter, {})[key] = value
                else:
                    {"weights": found.weights, "others": found.others}[kind][rest] = value
            if {name: list(value.shape) for name, value in found.weights.items()} != self.run.shapes:
                raise ValueError("its parameters have other names or shapes than those of the run")
        return found

    def drop_state(self, step: int) -> None:
        """Removes a state."""
        self._state_path(step).unlink(missing_ok=True)

    def _read(self, path: Path, form: Format) -> tuple[Any, dict[str, Tensor]]:
        """The record and the tensors of a file of this run."""
        if not path.exists():
            raise ConfigurationError(f"{str(path)!r} is missing. {_REMEDY}")
        _, record, tensors = read_file(path, form)
        if not isinstance(record, Mapping) or record.get("run") != self.run.mark:
            raise ConfigurationError(
                f"{str(path)!r} is of another training run than {_MANIFEST} in the same folder. {_REMEDY}"
            )
        return record, tensors

    # ----------------------------------------------------------------------------------------------------------------
    # Steps
    # ----------------------------------------------------------------------------------------------------------------

    def add_steps(self, steps: Sequence[StepRecord]) -> None:
        """Writes steps that follow each other."""
        if not steps:
            return
        batches = [batch for step in steps for batch in step.batches]
        tensors = {"ids": torch.cat([batch.ids for batch in batches]).to(torch.int64)}
        for place, batch in enumerate(batches):
            for kind in _GENERATORS:
                tensors |= {f"{kind}/{place}/{name}": value for name, value in getattr(batch, kind).items()}
        record: dict[str, Any] = {"run": self.run.mark, "steps": []}
        before: dict[str, Any] = {}
        for step in steps:
            values = {name: getattr(step, name) for name in _OF_STEP}
            changed = {name: value for name, value in values.items() if before.get(name) != value}
            parts = [[len(batch.ids), batch.index, batch.mark] for batch in step.batches]
            record["steps"].append({**changed, "batches": parts})
            before = values
        path = self._steps_path(steps[0].number, steps[-1].number + 1, self.rank)
        write_file(path, _STEPS, record, tensors)

    def steps(self, first: int, stop: int) -> list[StepRecord]:
        """The steps from ``first`` to before ``stop``.

        Raises:
            ConfigurationError: If a file is damaged or is of another run.
        """
        found = [self._steps_of(rank, first, stop) for rank in range(self.run.n_processes)]
        if len(found) == 1:
            return found[0]
        return [self._joined(steps) for steps in zip(*found, strict=True)]

    def _joined(self, steps: Sequence[StepRecord]) -> StepRecord:
        """A step of all processes, by rank."""
        sizes = {len(step.batches) for step in steps}
        if len(sizes) != 1:
            raise ConfigurationError(
                f"In step {steps[0].number} of the run in {str(self.folder)!r}, processes had different numbers of"
                " batches, so it cannot be replayed. Use the default influence, without `through`."
            )
        together = zip(*(step.batches for step in steps), strict=True)
        batches = [replace(batch, rank=rank) for one in together for rank, batch in reversed(list(enumerate(one)))]
        return replace(steps[0], divisor=steps[0].divisor * len(steps), batches=tuple(batches))

    def _steps_of(self, rank: int, first: int, stop: int) -> list[StepRecord]:
        """The steps of a process."""
        chunks = [chunk for chunk in self._chunks(rank) if chunk[0] < stop and chunk[1] > first]
        chosen = [step for chunk in chunks for step in self._chunk(rank, *chunk) if first <= step.number < stop]
        if [step.number for step in chosen] != list(range(first, stop)):
            raise ConfigurationError(
                f"Files with steps {first} to {stop} of {str(self.folder)!r} are missing. {_REMEDY}"
            )
        return chosen

    def _chunk(self, rank: int, first: int, stop: int) -> list[StepRecord]:
        """The steps of a file. Those of the last one are kept: a sweep asks for one part of it after the other."""
        if rank not in self._last or self._last[rank][0] != (first, stop):
            self._last[rank] = (first, stop), self._read_chunk(rank, first, stop)
        return self._last[rank][1]

    def _read_chunk(self, rank: int, first: int, stop: int) -> list[StepRecord]:
        path = self._steps_path(first, stop, rank)
        record, tensors = self._read(path, _STEPS)
        with parse_errors_name(path, _REMEDY):
            found, now, place, at = list[StepRecord](), dict[str, Any](), 0, 0
            states: dict[tuple[str, str], dict[str, Tensor]] = {}
            for name, value in tensors.items():
                kind, _, rest = name.partition("/")
                of, _, generator = rest.partition("/")
                states.setdefault((kind, of), {})[generator] = value
            for number, values in enumerate(record["steps"], first):
                now |= {name: value for name, value in values.items() if name != "batches"}
                batches = []
                for size, index, mark in values["batches"]:
                    before, reading = (states.get((kind, str(place)), {}) for kind in _GENERATORS)
                    ids = tensors["ids"][at : at + size]
                    batches.append(BatchRecord(ids, index, mark, before, reading=reading))
                    place, at = place + 1, at + size
                found.append(StepRecord(number=number, **now, batches=tuple(batches)))
            if len(found) != stop - first or at != len(tensors["ids"]):
                raise ValueError("its steps are not those that its name states")
        return found

    def resume(self, step: int) -> None:
        """Drops everything from ``step`` on, so that the run can go on from there.

        Raises:
            ConfigurationError: If steps before it are missing.
        """
        reached = max([stop for _, stop in self._chunks(self.rank)], default=0)
        if reached < step:
            raise ConfigurationError(
                f"the record in {str(self.folder)!r} ends at step {reached}, before the step {step} of the checkpoint."
                f" Continue from a checkpoint of step {reached} or earlier"
            )
        kept = [] if step == 0 else self._steps_of(self.rank, 0, step)
        for low, high in self._chunks(self.rank):
            if high > step:
                self.add_steps([one for one in kept if low <= one.number < high])
                self._steps_path(low, high, self.rank).unlink()
        if self.rank == 0:
            for state in self.states:
                if state > step:
                    self.drop_state(state)
            (self.folder / _AVERAGE).unlink(missing_ok=True)
        self.set_end(None)
