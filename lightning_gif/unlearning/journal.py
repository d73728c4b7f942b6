"""What was solved for on the way to an edit, kept in a folder, so that a call that was interrupted goes on there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..distributed import SINGLE_PROCESS, ProcessGroup
from ..errors import ConfigurationError
from ..storage.atomic import replace_file
from ..storage.digests import Fingerprint, differences, digest
from ..storage.schema import parse, parse_errors_name

__all__ = ["Journal"]


# Of a change, or of what a kill left of the writing of one.
_NAME = re.compile(r"change-\d{2,}\.safetensors|\.change-\d{2,}\.safetensors\.[0-9a-f]{32}")


@dataclass
class Journal:
    """Changes ``(k,)`` in the order in which they were solved for, a file for each, and plain values about them.

    A file is there as a whole or not at all. The first process reads and writes.

    Attributes:
        folder: Where.
        fingerprint: Of all that the changes depend on but each other, and the points that they were solved for at.
        processes: The processes.
        recalled: How many changes were found there.
    """

    folder: Path
    fingerprint: Fingerprint
    processes: ProcessGroup = SINGLE_PROCESS
    recalled: int = 0

    @staticmethod
    def check(folder: Path) -> None:
        """Makes sure that changes could be kept in a folder: better known before anything is solved for than after.

        It is tried out, and nothing is left of that; :meth:`keep` makes the folder.

        Raises:
            ConfigurationError: If it has something else in it, or could not be made or written to.
        """
        try:
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise ConfigurationError(f"`solves_to` must be a folder, but {str(folder)!r} is a file or a link.")
            for path in folder.iterdir() if folder.exists() else ():
                if not _NAME.fullmatch(path.name) or path.is_symlink() or not path.is_file():
                    raise ConfigurationError(
                        f"{str(folder)!r} is not empty and holds no solves that can be gone on with ({path.name})."
                        " Give another folder as `solves_to`."
                    )
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
            finally:
                for path in missing:
                    with contextlib.suppress(OSError):  # not there, or another process has put something into it
                        path.rmdir()
        except OSError as error:
            raise ConfigurationError(
                f"`solves_to` must be a folder that can be made and written to, but {str(folder)!r} cannot: {error}."
                " Give another folder."
            ) from error

    def recall(self, position: int, asked: list[Any], size: int) -> tuple[Tensor, dict[str, Any]] | None:
        """The change at a position, and what :meth:`keep` was told of it; ``None`` where there is none.

        Where something else was asked for there, what was solved for from there on is let go of: the walk takes
        another way, as one may do whose measurements differ in rounding.

        Args:
            position: In the order of the changes.
            asked: What is to be solved for, and where.
            size: ``k``.

        Raises:
            ConfigurationError: If the file is damaged, or of other weights, data or settings.
            OSError: If it cannot be read.
        """
        found = self.processes.broadcast(self._read(position, asked, size) if self.processes.rank == 0 else None)
        self.recalled += found is not None
        return found

    def _read(self, position: int, asked: list[Any], size: int) -> tuple[Tensor, dict[str, Any]] | None:
        path = self._path(position)
        if not path.exists():
            return None
        with self.parse_errors_name(position):
            path.open("rb").close()  # safetensors takes what a disk says for a file that is missing
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                record = {name: metadata[name] for name in ("fingerprint", "asked", "told")}
                if other := differences(parse(record["fingerprint"]), self.fingerprint):
                    raise ConfigurationError(
                        f"The solve in {str(path)!r} is of another call, which differs in: {other}. Or it is damaged."
                        " It cannot be gone on with: give another folder as `solves_to`; delete the file only if it is"
                        " damaged."
                    )
                if (shape := file.get_slice("change").get_shape()) != [size]:  # before it is read
                    raise ValueError(f"its change has shape {shape}, expected [{size}]")
                change = file.get_tensor("change")
            if digest({"change": change}, record) != metadata["digest"]:
                raise ValueError("its SHA-256 is another one")
            if parse(record["asked"]) != asked:
                self._drop(position)
                return None
            if not torch.isfinite(change).all():
                raise ValueError("its change is not finite")
            return change, parse(record["told"])

    def parse_errors_name(self, position: int) -> contextlib.AbstractContextManager[None]:
        """Turns what goes wrong with what :meth:`recall` gave into an error that names the file."""
        return parse_errors_name(self._path(position), "Delete it, and what is behind it is solved for anew.")

    def keep(self, position: int, asked: list[Any], change: Tensor, told: dict[str, Any]) -> None:
        """Writes down a change ``(k,)``, and plain values about it; makes the folder where there is none."""
        if self.processes.rank:
            return
        record = {"fingerprint": json.dumps(self.fingerprint), "asked": json.dumps(asked), "told": json.dumps(told)}
        tensors = {"change": change.detach().cpu().contiguous()}
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(self._path(position), save(tensors, metadata={**record, "digest": digest(tensors, record)}))

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
        """Lets go, where it can, of what a finished call no longer needs; of the folder too, once it is empty."""
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if _NAME.fullmatch(path.name):
                    path.unlink()
            folder.rmdir()
