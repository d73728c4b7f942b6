"""The journal: the solves of an edit in a folder, from which an interrupted ``unlearn`` resumes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..errors import ConfigurationError
from ..storage.artifact import Format, read_file, write_file
from ..storage.digests import Fingerprint, differences
from ..storage.schema import parse, parse_errors_name

__all__ = ["Journal"]


# The file of a change, or the temporary file that an interrupted write leaves.
_NAME = re.compile(r"change-\d{2,}\.safetensors|\.change-\d{2,}\.safetensors\.[0-9a-f]{32}")


def _unversioned(metadata: Mapping[str, str]) -> tuple[Any, object]:
    """The record of a file of the first format, which held each part as JSON text, and what its digest is of."""
    texts = {name: metadata[name] for name in ("fingerprint", "asked", "told")}
    fingerprint, request, values = (parse(text) for text in texts.values())
    return {"fingerprint": fingerprint, "request": request, "values": values}, texts


_FORMAT = Format(
    "lightning-gif solve",
    versions=(1,),
    what="a solve of `unlearn`",
    remedy="Delete it: this solve and later ones are repeated.",
    unversioned=_unversioned,
)


@dataclass
class Journal:
    """Changes ``(k,)`` in the order of their solves, one file for each, with plain values about each solve.

    Files are written atomically. Only the first process reads and writes.

    Attributes:
        folder: The folder with the files.
        fingerprint: Digests and values of everything that the changes depend on, except earlier changes and trials.
        processes: The process group.
        recalled: The number of changes that were read.
    """

    folder: Path
    fingerprint: Fingerprint
    processes: ProcessGroup = SINGLE_PROCESS
    recalled: int = 0

    @staticmethod
    def check(folder: Path) -> None:
        """Checks that changes can be written to a folder.

        To check this, a missing folder is created and removed again. :meth:`keep` creates it permanently.

        Raises:
            ConfigurationError: If the folder holds other files, or cannot be created or written to.
        """
        try:
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise ConfigurationError(f"`solves_to` must be a folder, but {str(folder)!r} is a file or a link.")
            for path in folder.iterdir() if folder.exists() else ():
                if not _NAME.fullmatch(path.name) or path.is_symlink() or not path.is_file():
                    raise ConfigurationError(
                        f"{str(folder)!r} holds {path.name!r}, which is not a solve of an earlier call."
                        " Give another folder as `solves_to`."
                    )
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            finally:
                for path in missing:
                    with contextlib.suppress(OSError):  # it does not exist, or another process has written to it
                        path.rmdir()
        except OSError as error:
            raise ConfigurationError(
                f"`solves_to` must be a folder that can be created and written to, but {str(folder)!r} cannot: {error}."
                " Give another folder."
            ) from error

    def recall(self, position: int, request: list[Any], size: int) -> tuple[Tensor, dict[str, Any]] | None:
        """The change at a position and the values that :meth:`keep` stored with it; ``None`` if there is none.

        If the stored change belongs to another request, it is deleted with all later ones. This happens if the strategy
        took other step sizes than before, for example because of rounding.

        Args:
            position: The position in the order of the changes.
            request: Which change is to be solved, and at which trial.
            size: The number of target parameters, ``k``.

        Raises:
            ConfigurationError: If the file is damaged, or belongs to other weights, data or settings.
            OSError: If the file cannot be read.
        """
        stored = self.processes.broadcast(self._read(position, request, size) if self.processes.rank == 0 else None)
        self.recalled += stored is not None
        return stored

    def _read(self, position: int, request: list[Any], size: int) -> tuple[Tensor, dict[str, Any]] | None:
        path = self._path(position)
        if not path.exists():
            return None

        def check(record: Any, shapes: dict[str, list[int]]) -> None:
            if other := differences(record["fingerprint"], self.fingerprint):
                raise ConfigurationError(
                    f"The solve in {str(path)!r} is of another call, which differs in: {other}. Or the file is damaged."
                    " This call cannot resume from it. Give another folder as `solves_to`; delete the file only if it"
                    " is damaged."
                )
            if shapes["change"] != [size]:
                raise ValueError(f"its change has shape {shapes['change']}, expected [{size}]")

        _, record, tensors = read_file(path, _FORMAT, check)
        with self.parse_errors_name(position):
            if record["request"] != request:
                self._drop(position)
                return None
            if not torch.isfinite(tensors["change"]).all():
                raise ValueError("its change is not finite")
            return tensors["change"], record["values"]

    def parse_errors_name(self, position: int) -> contextlib.AbstractContextManager[None]:
        """Re-raises errors about the values that :meth:`recall` returned as one that names the file."""
        return parse_errors_name(self._path(position), _FORMAT.remedy)

    def keep(self, position: int, request: list[Any], change: Tensor, values: dict[str, Any]) -> None:
        """Writes a change ``(k,)`` and plain values about its solve. Creates the folder if it does not exist."""
        if self.processes.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {"fingerprint": self.fingerprint, "request": request, "values": values}
        write_file(self._path(position), _FORMAT, record, {"change": change})

    def _path(self, position: int) -> Path:
        return self.folder / f"change-{position:02}.safetensors"

    def _drop(self, first: int) -> None:
        last = first
        while self._path(last).exists():
            last += 1
        for position in reversed(range(first, last)):
            self._path(position).unlink()

    @classmethod
    def clear(cls, folder: Path) -> None:
        """Deletes the changes after a finished call, and the folder if it is then empty.

        Files that cannot be deleted stay.
        """
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if _NAME.fullmatch(path.name):
                    path.unlink()
            folder.rmdir()
