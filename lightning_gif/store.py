"""Where scores go: into memory, or a file that may be larger, and is still there after an interruption."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import ConfigurationError
from .writing import replace_file

__all__ = ["InMemory", "ScoreStore"]

_VERSION = 1
_MANIFEST, _SCORES, _DONE, _DIRECTIONS = "manifest.json", "scores.bin", "done.bin", "directions.safetensors"


class InMemory:
    """Scores ``(n_queries, n)`` in float64 as a tensor.

    Attributes:
        scores: Those that were written so far; the others are anything.
    """

    def __init__(self, queries: int, examples: int) -> None:
        self.scores = torch.empty(queries, examples, dtype=torch.float64)

    def missing(self, start: int, stop: int) -> bool:
        """Whether scores of these positions are still wanted: always, each is given once."""
        return True

    def write(self, start: int, block: Tensor) -> None:
        """Puts down the scores ``(n_queries, b)`` of the examples from position ``start`` on."""
        self.scores[:, start : start + block.shape[1]] = block


@dataclass
class ScoreStore:
    """Scores ``(n_queries, n)`` in float64 in a folder, example by example, each with a flag once it is written.

    A score is written, and has reached the disk, before its flag: whatever interrupts this, what is flagged is right.
    The directions that a solve found are kept until all scores are there, so that it need not be done again.

    Attributes:
        folder: Where.
        scores: ``(n_queries, n)``, a view of the file.
        done: ``(n,)``, bool, a view of the file.
    """

    folder: Path
    scores: Tensor
    done: Tensor
    _maps: tuple[mmap.mmap, mmap.mmap]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], queries: int, examples: int, fingerprint: str) -> ScoreStore:
        """A new store, or the one that an interrupted run has left in the folder.

        Args:
            folder: The folder; made where there is none.
            queries: ``n_queries``.
            examples: ``n``.
            fingerprint: Of everything that the scores depend on.

        Raises:
            ConfigurationError: If the folder has something else in it: other files, or scores of other weights, data
                or settings, or damaged ones. It is left as it is.
        """
        folder = Path(folder)
        manifest = {"version": _VERSION, "queries": queries, "examples": examples, "fingerprint": fingerprint}
        sizes = {_SCORES: 8 * queries * examples, _DONE: examples}
        if not folder.exists() or not any(folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            for name, size in sizes.items():
                with open(folder / name, "wb") as file:
                    file.truncate(size)
            replace_file(folder / _MANIFEST, json.dumps(manifest, indent=1).encode())
        else:
            cls._check(folder, manifest, sizes)
        maps = tuple(_map(folder / name, size) for name, size in sizes.items())
        scores = torch.frombuffer(maps[0], dtype=torch.float64).view(examples, queries).T
        done = torch.frombuffer(maps[1], dtype=torch.bool)
        return cls(folder, scores, done, (maps[0], maps[1]))

    @staticmethod
    def _check(folder: Path, manifest: dict[str, Any], sizes: dict[str, int]) -> None:
        try:
            found = json.loads((folder / _MANIFEST).read_bytes())
        except (OSError, ValueError):
            raise ConfigurationError(
                f"{folder} is not empty and holds no scores that can be gone on with. Give another folder."
            ) from None
        other = [name for name in manifest if not isinstance(found, dict) or found.get(name) != manifest[name]]
        if other:
            raise ConfigurationError(
                f"The scores in {folder} are of other weights, data, queries or settings ({', '.join(other)} differ):"
                " they cannot be gone on with. Give another folder, or delete that one."
            )
        for name, size in sizes.items():
            there = (folder / name).stat().st_size if (folder / name).exists() else 0
            if there != size:
                raise ConfigurationError(
                    f"{folder / name} has {there} bytes, expected {size}: it is damaged. Delete the folder and start"
                    " anew."
                )

    def missing(self, start: int, stop: int) -> bool:
        """Whether the scores of some of these positions are not there yet."""
        return not self.done[start:stop].all()

    def write(self, start: int, block: Tensor) -> None:
        """Puts down the scores ``(n_queries, b)`` of the examples from position ``start`` on."""
        stop = start + block.shape[1]
        self.scores[:, start:stop] = block
        self._maps[0].flush()
        self.done[start:stop] = True
        self._maps[1].flush()

    def save_directions(self, directions: Tensor, told: list[dict[str, Any]]) -> None:
        """Keeps what solves have found: ``(m, p)``, and plain values about each."""
        content = save({"directions": directions.contiguous().cpu()}, metadata={"told": json.dumps(told)})
        replace_file(self.folder / _DIRECTIONS, content)

    def load_directions(self, count: int, size: int) -> tuple[Tensor, list[dict[str, Any]]] | None:
        """What :meth:`save_directions` has kept, ``None`` if that is not there.

        Args:
            count: ``m``.
            size: ``p``.

        Raises:
            ConfigurationError: If the file is damaged.
        """
        path = self.folder / _DIRECTIONS
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                told, directions = json.loads((file.metadata() or {})["told"]), file.get_tensor("directions")
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ConfigurationError(f"{path} is damaged ({error}). Delete the folder and start anew.") from None
        if directions.shape != (count, size) or not torch.isfinite(directions).all():
            raise ConfigurationError(
                f"{path} has directions of shape {list(directions.shape)}, expected finite ones of shape"
                f" [{count}, {size}]. Delete the folder and start anew."
            )
        return directions, told

    def finish(self) -> None:
        """Lets go of what only an unfinished run needs."""
        (self.folder / _DIRECTIONS).unlink(missing_ok=True)


def _map(path: Path, size: int) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size)
