"""The command line: explain and edit a checkpoint, test scores, undo an edit, and verify the audit log.

Models, data, trainers and config files are given as for ``LightningCLI``, on which it is built. Each command imports
what it needs when it is run, so that ``--help`` and ``verify`` answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .._compat import is_misconfiguration
from ..errors import GIFError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "check": (
        "model",
        "Reports how a model's losses are computed, which layers may change, and what the other commands will cost.",
    ),
    "influence": ("model", "Scores the training examples by their influence on the loss of some examples."),
    "store": ("model", "Writes a store of the gradients of the training examples, from which `influence` answers."),
    "validate": (
        "model",
        "Tests how well the scores of a checkpoint predict retraining, by training new models on random subsets.",
    ),
    "unlearn": ("model", "Makes a checkpoint forget training examples, or corrects their labels."),
    "undo": ("files", "Undoes an edit in a checkpoint: restores the weights bit for bit."),
    "verify": ("files", "Verifies an audit log. Exits with 0 if it is intact, with 1 if not."),
}
"""The commands, each with its module and the first line of its documentation."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        The exit code: 0 for success, 1 for a failed verification, 2 for an error, 130 for Ctrl-C. Errors and Ctrl-C
        print one line.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-gif",
        description="Influence functions and unlearning for checkpoints of PyTorch Lightning.",
        epilog="\n".join(f"{name:<10} {line}" for name, (_, line) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help="followed by its arguments, or --help")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    try:
        import docstring_parser  # noqa: F401
        import jsonargparse  # noqa: F401
    except ModuleNotFoundError as error:
        return _fail(command, f"The command line needs {error.name}. Install it: pip install 'lightning-gif[cli]'")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as for python -m, because models are given by import path
    module, _ = COMMANDS[command]
    try:
        code: int = importlib.import_module(f"{__name__}.{module}").run(command, arguments[1:])
        return code
    except Exception as error:
        if isinstance(error, (GIFError, OSError)) or is_misconfiguration(error):
            return _fail(command, str(error))
        raise
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "No file was written in part."
        if not str(interrupt) and command == "unlearn":
            message += " With --solves_to, the same command resumes after the last finished solve."
        if command == "store":
            message = "The same command resumes after the last complete chunk of 4096 examples."
        if command == "validate":
            message += " The same command resumes after the last model that was trained."
        return _fail(command, f"interrupted. {message}", code=130)


def _fail(command: str, message: str, *, code: int = 2) -> int:
    print(f"lightning-gif {command}: {' '.join(message.split())}", file=sys.stderr)
    return code
