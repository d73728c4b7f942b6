"""Stores of scores: in memory, or in a folder from which an interrupted call resumes."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._compat import rank_zero_warn
from ..errors import ConfigurationError, GIFWarning
from ..storage.artifact import Format, read_file, write_file
from ..storage.atomic import replace_file
from ..storage.digests import Fingerprint, differences
from ..storage.schema import parse, parse_errors_name, read

__all__ = ["InMemory", "ScoreStore"]


_VERSION = 4

# The number of examples whose checksums are verified at a time.
_CHECKED = 65536

_MANIFEST, _SCORES, _ERRORS, _DONE = "manifest.json", "scores.bin", "standard_errors.bin", "done.bin"
_DIRECTIONS = "directions-*.safetensors"


def _unversioned(metadata: Mapping[str, str]) -> tuple[Any, object]:
    """The record of a file of the first format, and the value that its digest is of."""
    values = parse(metadata["told"])
    return values, values


_DIRECTIONS_FORMAT = Format(
    "lightning-gif directions",
    versions=(1,),
    what="a file of solves of `influence`",
    remedy="Delete it: its solves are repeated.",
    unversioned=_unversioned,
)


class InMemory:
    """Scores ``(n_queries, n)`` in float64 as a tensor.

    Args:
        queries: The number of queries.
        examples: The number of examples, ``n``.
        with_errors: Whether scores have standard errors.

    Attributes:
        scores: The scores. Values that were not written yet are arbitrary.
        standard_errors: Their standard errors; ``None`` if they have none.
    """

    def __init__(self, queries: int, examples: int, *, with_errors: bool = False) -> None:
        self.scores = torch.empty(queries, examples, dtype=torch.float64)
        self.standard_errors = torch.empty_like(self.scores) if with_errors else None

    def write(self, start: int, block: Tensor, errors: Tensor | None = None) -> None:
        """Writes the scores ``(n_queries, b)``, and their errors, of the examples from position ``start`` on."""
        self.scores[:, start : start + block.shape[1]] = block
        if self.standard_errors is not None and errors is not None:
            self.standard_errors[:, start : start + block.shape[1]] = errors


@dataclass
class ScoreStore:
    """Scores ``(n_queries, n)`` in float64 in a folder, with a checksum for the scores of each example.

    Standard errors, if scores have them, are in a file of their own, and the checksum is of both. Scores are written to
    disk before their checksum. So scores that match their checksum are complete, even after an
    interruption or later damage. The iHVPs are kept until all scores are written, so that a call that resumes does not
    repeat the solves. The diagnostics of the solves are kept permanently.

    Attributes:
        folder: The folder with the files.
        scores: The scores ``(n_queries, n)``, a view of the file.
        standard_errors: Their standard errors, a view of another file; ``None`` if they have none.
        done: The examples with complete scores, ``(n,)`` bool.
    """

    folder: Path
    scores: Tensor
    standard_errors: Tensor | None
    done: Tensor
    _marks: Tensor
    _maps: dict[str, mmap.mmap]

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        queries: int,
        examples: int,
        fingerprint: Fingerprint,
        *,
        with_errors: bool = False,
    ) -> ScoreStore:
        """Opens a new store, or the store that an interrupted call left in the folder.

        Args:
            folder: The folder. It is created if it does not exist.
            queries: The number of queries.
            examples: The number of examples, ``n``.
            fingerprint: Digests and values of everything that the scores depend on.
            with_errors: Whether scores have standard errors.

        Raises:
            ConfigurationError: If the folder holds other files, links, files of another size, or scores of other
                weights, data or settings. It is left unchanged.
            OSError: If the disk does not have enough space for all scores.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(
                f"Scores are written to a folder, but {str(folder)!r} is a file. Give another path."
            )
        manifest = {"format": _VERSION, "n_queries": queries, "n_examples": examples, **fingerprint}
        values = [_SCORES, _ERRORS] if with_errors else [_SCORES]
        sizes = {**dict.fromkeys(values, 8 * queries * examples), _DONE: 4 * examples}
        if not folder.exists() or all(path.name.startswith(f".{_MANIFEST}.") for path in folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
        cls._check(folder, manifest)
        # An earlier version wrote no standard errors. Its scores are computed again.
        earlier = (folder / _DONE).exists() and with_errors and not (folder / _ERRORS).exists()
        if earlier or not (folder / _DONE).exists():  # this file is created last, so no scores have been written
            for name in values:
                if not (earlier and name == _SCORES):
                    _reserve(folder / name, sizes[name])
            replace_file(folder / _DONE, bytes(sizes[_DONE]))
        maps = {name: _map(folder / name, size) for name, size in sizes.items()}
        scores, errors = (
            torch.frombuffer(maps[name], dtype=torch.float64).view(examples, queries).T if name in maps else None
            for name in (_SCORES, _ERRORS)
        )
        assert scores is not None
        marks = torch.frombuffer(maps[_DONE], dtype=torch.int32)
        done = marks != 0
        written = done.nonzero().squeeze(1)
        for part in written.split(_CHECKED):
            done[part] = _marks_of(scores[:, part], None if errors is None else errors[:, part]) == marks[part]
        if damaged := len(written) - int(done.sum()):
            rank_zero_warn(
                f"The scores of {damaged} of {examples} examples in {folder} are damaged. They are computed again.",
                category=GIFWarning,
            )
        return cls(folder, scores, errors, done, marks, maps)

    @staticmethod
    def _check(folder: Path, manifest: dict[str, Any]) -> None:
        paths = [folder / name for name in (_MANIFEST, _SCORES, _ERRORS, _DONE)] + sorted(folder.glob(_DIRECTIONS))
        linked = [path.name for path in paths if path.is_symlink()]
        if linked:  # scores would overwrite the file that a link points to
            raise ConfigurationError(f"{folder} holds links ({', '.join(linked)}). Give another folder.")
        try:
            other = differences(read(folder / _MANIFEST), manifest)
        except (OSError, ValueError):
            raise ConfigurationError(
                f"{folder} is not empty, but holds no scores of an earlier call. Give another folder."
            ) from None
        if other:
            raise ConfigurationError(
                f"The scores in {folder} are of another call, which differs in: {other}. This call cannot resume from"
                " them. Give another folder, or delete this one."
            )

    def write(self, start: int, block: Tensor, errors: Tensor | None = None) -> None:
        """Writes the scores ``(n_queries, b)``, and their errors, of the examples from position ``start`` on."""
        stop = start + block.shape[1]
        self.scores[:, start:stop] = block
        self._maps[_SCORES].flush()
        if self.standard_errors is not None and errors is not None:
            self.standard_errors[:, start:stop] = errors
            self._maps[_ERRORS].flush()
        self._marks[start:stop] = _marks_of(block.double(), errors)
        self._maps[_DONE].flush()
        self.done[start:stop] = True

    def save_directions(self, state: int, directions: Tensor, values: dict[str, Any]) -> None:
        """Writes the iHVPs at a state of the model.

        Args:
            state: The number of the state.
            directions: The iHVPs ``(n_queries, p)``; an empty tensor ``(0, p)`` if all scores are written.
            values: The diagnostics of the solves as plain values.
        """
        write_file(self._directions_at(state), _DIRECTIONS_FORMAT, values, {"directions": directions})

    def load_directions(self, state: int, size: int) -> tuple[Tensor, dict[str, Any]] | None:
        """What :meth:`save_directions` wrote; ``None`` if there is no such file, or if it lacks iHVPs that are needed.

        Args:
            state: The number of the state.
            size: The number of parameters, ``p``.

        Raises:
            ConfigurationError: If the file is damaged.
            OSError: If the file cannot be read.
        """
        path = self._directions_at(state)
        if not path.exists():
            return None

        def check(values: Any, shapes: dict[str, list[int]]) -> None:
            shape, queries = shapes["directions"], len(self.scores)
            if shape not in ([0, size], [queries, size]):
                raise ValueError(f"its directions have shape {shape}, expected [{queries}, {size}]")

        _, values, tensors = read_file(path, _DIRECTIONS_FORMAT, check)
        directions = tensors["directions"]
        with self.parse_errors_name(state):
            if not torch.isfinite(directions).all():
                raise ValueError("its directions are not finite")
        if not len(directions) and not self.done.all():  # some scores were damaged after all had been written
            return None
        return directions, values

    def parse_errors_name(self, state: int) -> contextlib.AbstractContextManager[None]:
        """Re-raises errors about the values that :meth:`load_directions` returned as one that names the file."""
        return parse_errors_name(self._directions_at(state), _DIRECTIONS_FORMAT.remedy)

    def _directions_at(self, state: int) -> Path:
        return self.folder / _DIRECTIONS.replace("*", str(state))


def _reserve(path: Path, size: int) -> None:
    """Creates a file of zeros and reserves its disk space.

    Without reserved space, writing to a memory map of the file would kill the process when the disk is full.
    """
    try:
        with open(path, "wb") as file:
            file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):  # not on macOS and Windows
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # the file system cannot reserve space
            return
        path.unlink(missing_ok=True)
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def _marks_of(scores: Tensor, errors: Tensor | None) -> Tensor:
    """A checksum of each example's scores and standard errors ``(n_queries, b)``: ``(b,)`` int32, never 0."""
    values = scores if errors is None else torch.cat([scores, errors])
    rows = values.T.contiguous().numpy()
    return torch.tensor([zlib.crc32(row) or 1 for row in rows], dtype=torch.int64).to(torch.int32)


def _map(path: Path, size: int) -> mmap.mmap:
    there = path.stat().st_size if path.exists() else 0
    if there != size:
        raise ConfigurationError(
            f"{path} has {there} bytes, expected {size}: it is damaged. Delete the folder and make the call again."
        )
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size)
