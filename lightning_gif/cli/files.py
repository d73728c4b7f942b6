"""The commands on files alone. What needs PyTorch is imported when the arguments are known, so that help is quick.

An audit log on its own is verified without PyTorch, and no command needs Lightning.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from ..storage.verification import verify_log
from .parsing import parsed

__all__ = ["COMMANDS", "run", "undo", "verify_record"]


def run(command: str, arguments: Sequence[str]) -> int:
    """Runs one of the commands."""
    function = COMMANDS[command]
    return function(**parsed(command, function, arguments))


def undo(edit: str, ckpt_path: str, output: str, record: str | None = None) -> int:
    """Undoes an edit in a checkpoint: restores the weights bit for bit.

    Args:
        edit: The edit file.
        ckpt_path: The edited checkpoint. It is not changed, unless it is also the output.
        output: The file for the checkpoint without the edit.
        record: The audit log.
    """
    importlib.import_module("lightning_gif.cli.rewriting").undo(edit, ckpt_path, output, record)
    print(f"{output} has, bit for bit, the weights before the edit.")
    return 0


def verify_record(
    record: str,
    edit: list[str] | str | None = None,
    ckpt_path: str | None = None,
    published: str | None = None,
) -> int:
    """Verifies an audit log. Exits with 0 if it is intact, with 1 if not.

    Args:
        record: The audit log.
        edit: An edit file, or a list of edit files. Each must match its entry.
        ckpt_path: A checkpoint. Its weights must match the last entry.
        published: The hash of an entry that was stored elsewhere.
    """
    edits = [edit] if isinstance(edit, str) else edit or []
    if edits or ckpt_path is not None:
        against = importlib.import_module("lightning_gif.verification")
        verification = against.verify(record, edits=edits, checkpoint=ckpt_path, published=published)
    else:
        verification = verify_log(record, published)
    print(verification)
    return 0 if verification.ok else 1


COMMANDS: dict[str, Callable[..., int]] = {"undo": undo, "verify": verify_record}
