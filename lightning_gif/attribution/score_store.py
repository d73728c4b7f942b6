"""Where scores go: into memory, or a file that may be larger, and is still there after an interruption."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .._compat import rank_zero_warn
from ..errors import ConfigurationError, GIFWarning
from ..storage.atomic import replace_file
from ..storage.digests import Fingerprint, differences, digest
from ..storage.schema import parse, parse_errors_name, read

__all__ = ["InMemory", "ScoreStore"]


_VERSION = 4

# How many examples' scores are looked at at a time.
_CHECKED = 65536

_MANIFEST, _SCORES, _DONE, _DIRECTIONS = "manifest.json", "scores.bin", "done.bin", "directions-*.safetensors"


class InMemory:
    """Scores ``(n_queries, n)`` in float64 as a tensor.

    Attributes:
        scores: Those that were written so far; the others are anything.
    """

    def __init__(self, queries: int, examples: int) -> None:
        self.scores = torch.empty(queries, examples, dtype=torch.float64)

    def write(self, start: int, block: Tensor) -> None:
        """Puts down the scores ``(n_queries, b)`` of the examples from position ``start`` on."""
        self.scores[:, start : start + block.shape[1]] = block


@dataclass
class ScoreStore:
    """Scores ``(n_queries, n)`` in float64 in a folder, example by example, each with a mark once it is written.

    Scores are written, and have reached the disk, before their mark, which is a checksum of them: whatever interrupts
    this, or damages the file later, what is marked is right. The directions that solves found are kept until all
    scores are there, so that they need not be done again; what is told of the solves stays.

    Attributes:
        folder: Where.
        scores: ``(n_queries, n)``, a view of the file.
        done: ``(n,)``, bool: of which examples the scores are there.
    """

    folder: Path
    scores: Tensor
    done: Tensor
    _marks: Tensor
    _maps: tuple[mmap.mmap, mmap.mmap]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], queries: int, examples: int, fingerprint: Fingerprint) -> ScoreStore:
        """A new store, or the one that an interrupted run has left in the folder.

        Args:
            folder: The folder; made where there is none.
            queries: ``n_queries``.
            examples: ``n``.
            fingerprint: Of everything that the scores depend on.

        Raises:
            ConfigurationError: If the folder has something else in it: other files, or scores of other weights, data
                or settings, or links, or files of another size. It is left as it is.
            OSError: If there is no room on the disk for all of the scores.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ConfigurationError(
                f"Scores are written to a folder, but {str(folder)!r} is a file. Give another path."
            )
        manifest = {"format": _VERSION, "n_queries": queries, "n_examples": examples, **fingerprint}
        sizes = {_SCORES: 8 * queries * examples, _DONE: 4 * examples}
        if not folder.exists() or all(path.name.startswith(f".{_MANIFEST}.") for path in folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
        cls._check(folder, manifest)
        if not (folder / _DONE).exists():  # which is made last: nothing has been written before
            _reserve(folder / _SCORES, sizes[_SCORES])
            replace_file(folder / _DONE, bytes(sizes[_DONE]))
        maps = tuple(_map(folder / name, size) for name, size in sizes.items())
        scores = torch.frombuffer(maps[0], dtype=torch.float64).view(examples, queries).T
        marks = torch.frombuffer(maps[1], dtype=torch.int32)
        done = marks != 0
        written = done.nonzero().squeeze(1)
        for part in written.split(_CHECKED):
            done[part] = _marks_of(scores[:, part]) == marks[part]
        if damaged := len(written) - int(done.sum()):
            rank_zero_warn(
                f"The scores of {damaged} of {examples} examples in {folder} are damaged, and are computed anew.",
                category=GIFWarning,
            )
        return cls(folder, scores, done, marks, (maps[0], maps[1]))

    @staticmethod
    def _check(folder: Path, manifest: dict[str, Any]) -> None:
        paths = [folder / name for name in (_MANIFEST, _SCORES, _DONE)] + sorted(folder.glob(_DIRECTIONS))
        linked = [path.name for path in paths if path.is_symlink()]
        if linked:  # it would be another file, anywhere, that scores are written to
            raise ConfigurationError(f"{folder} has links in it ({', '.join(linked)}). Give another folder.")
        try:
            other = differences(read(folder / _MANIFEST), manifest)
        except (OSError, ValueError):
            raise ConfigurationError(
                f"{folder} is not empty and holds no scores that can be gone on with. Give another folder."
            ) from None
        if other:
            raise ConfigurationError(
                f"The scores in {folder} are of another call, which differs in: {other}. They cannot be gone on with."
                " Give another folder, or delete that one."
            )

    def write(self, start: int, block: Tensor) -> None:
        """Puts down the scores ``(n_queries, b)`` of the examples from position ``start`` on."""
        stop = start + block.shape[1]
        self.scores[:, start:stop] = block
        self._maps[0].flush()
        self._marks[start:stop] = _marks_of(block.double())
        self._maps[1].flush()
        self.done[start:stop] = True

    def save_directions(self, state: int, directions: Tensor, told: dict[str, Any]) -> None:
        """Keeps what the solves at a state of the model have found.

        Args:
            state: Its number.
            directions: ``(n_queries, p)``; none of them, ``(0, p)``, once all scores are there.
            told: Plain values about the solves.
        """
        tensors = {"directions": directions.contiguous().cpu()}
        content = save(tensors, metadata={"told": json.dumps(told), "digest": digest(tensors, told)})
        replace_file(self._directions_at(state), content)

    def load_directions(self, state: int, size: int) -> tuple[Tensor, dict[str, Any]] | None:
        """What :meth:`save_directions` has kept; ``None`` if that is not there, or not all that is needed still.

        Args:
            state: The number of the state.
            size: ``p``.

        Raises:
            ConfigurationError: If the file is damaged.
        """
        path = self._directions_at(state)
        if not path.exists():
            return None
        with self.parse_errors_name(state):
            try:
                with safe_open(path, "pt") as file:
                    metadata, directions = file.metadata() or {}, file.get_tensor("directions")
            except OSError as error:  # a folder in its place, or a disk that fails
                raise ValueError(str(error)) from error
            told = parse(metadata["told"])
            if digest({"directions": directions}, told) != metadata["digest"]:
                raise ValueError("its SHA-256 is another one")
            if len(directions) not in (0, len(self.scores)) or directions.shape[1:] != (size,):
                expected = f"[{len(self.scores)}, {size}]"
                raise ValueError(f"its directions have the shape {list(directions.shape)}, expected {expected}")
            if not torch.isfinite(directions).all():
                raise ValueError("its directions are not finite")
        if not len(directions) and not self.done.all():  # some of the scores were damaged since
            return None
        return directions, told

    def parse_errors_name(self, state: int) -> contextlib.AbstractContextManager[None]:
        """Turns what goes wrong with what :meth:`load_directions` gave into an error that names the file."""
        return parse_errors_name(self._directions_at(state), "Delete it, and what it tells is solved for again.")

    def _directions_at(self, state: int) -> Path:
        return self.folder / _DIRECTIONS.replace("*", str(state))


def _reserve(path: Path, size: int) -> None:
    """A file of zeros whose room on the disk is taken: to write to a map of it without would end the process."""
    try:
        with open(path, "wb") as file:
            file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):  # not on macOS and Windows
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # a file system that cannot
            return
        path.unlink(missing_ok=True)
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def _marks_of(scores: Tensor) -> Tensor:
    """A checksum of each example's scores ``(n_queries, b)``, ``(b,)`` int32, which is never 0."""
    rows = scores.T.contiguous().numpy()
    return torch.tensor([zlib.crc32(row) or 1 for row in rows], dtype=torch.int64).to(torch.int32)


def _map(path: Path, size: int) -> mmap.mmap:
    there = path.stat().st_size if path.exists() else 0
    if there != size:
        raise ConfigurationError(
            f"{path} has {there} bytes, expected {size}: it is damaged. Delete the folder and start anew."
        )
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size)
