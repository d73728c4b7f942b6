"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["replace_file", "sync"]


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file, which takes the place of an old one once all of it is on the disk, and not before.

    Args:
        path: Where to; its folder must be there.
        content: All of it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)  # with the permissions of any new file
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:  # Windows, for folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
